// The norm over all gradients of a step, and the factor that clips it.
#pragma once
#include <cstdint>

#include "launch_list.h"

namespace danlu {

constexpr int norm_chunk = 16384;  // elements of a block

struct Norm {
  double squares;
  float factor;  // multiplies every gradient
};

// Leaves sums of squares, one for each chunk. The launch has tensors without states, their gradients of one
// of torch's formats; in the place of a parameter stands the address of its first sum.
cudaError_t launch_squares(Format format, LaunchPacker& packer, cudaStream_t stream);

// factor = 1 / grad_scale / max(1, norm / max_norm), of the gradients without their scale. grad_scale: on the
// device, or null for 1.
cudaError_t launch_norm(const double* sums, int64_t count, double max_norm, const float* grad_scale,
                        Norm* norm, cudaStream_t stream);

}  // namespace danlu
