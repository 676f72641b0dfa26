// The memory ceiling on a GPU: a kernel that does nothing but the reads and writes of an in-place step.
#pragma once
#include <cstdint>
#include <vector>

namespace danlu {

// Every written array is read and written, `read` only read: Lion's traffic is two written arrays, AdamW's
// three. Addresses of `size` fp32 values on the device, multiples of 16.
void stream(const std::vector<uintptr_t>& written, uintptr_t read, int64_t size, int device,
            uintptr_t cuda_stream);

}  // namespace danlu
