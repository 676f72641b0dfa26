// The CUDA runtime, or the emulator that stands in for it where kernels run on the CPU.
#pragma once
#if defined(DANLU_EMULATOR)
#include "../emulator/emulator.h"
#else
#include <cuda_runtime.h>
#define SHARED_ARRAY(type, name, size) __shared__ type name[size]
#endif
