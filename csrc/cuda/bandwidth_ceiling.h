// The bandwidth ceilings on a GPU: kernels that do nothing but the reads and writes of an in-place step, or
// the reads of a norm.
#pragma once
#include <cstdint>
#include <vector>

namespace danlu {

// Every written array is read and written, `read` only read: Lion's traffic is two written arrays, AdamW's
// three. Addresses of `size` fp32 values on the device, multiples of 16.
void bandwidth_ceiling(const std::vector<uintptr_t>& written, uintptr_t read, int64_t size, int device,
                       uintptr_t cuda_stream);

// Reads `size` fp32 values on the device at a multiple of 16, and leaves them as they are unless there is a
// NaN.
void read_through(uintptr_t address, int64_t size, int device, uintptr_t cuda_stream);

}  // namespace danlu
