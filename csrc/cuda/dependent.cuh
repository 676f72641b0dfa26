// Programmatic dependent launch (compute capability 9.0 and newer): a pass may start while the one before it
// ends, and waits for it before it reads or writes what that one does.
//
// The wait is for the whole grid before and makes all that it wrote visible. A grid is complete when its
// threads have ended, so that a pass which every thread waits in is complete only after all passes before it
// are. The first pass of a list is launched in the stream's full order: what other kernels wrote before
// (gradients, tables, factors) is there for every pass. The last one lets nothing start early: whatever
// follows, waiting or not, finds a step that is complete.
#pragma once
#include "runtime.h"

namespace danlu {

__device__ __forceinline__ void wait_for_pass_before() {
#if defined(DANLU_EMULATOR)
  emulator::wait_for_launch_before();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Called behind the wait, so that two passes overlap at most. The next one starts when all blocks have called
// it.
__device__ __forceinline__ void let_next_pass_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace danlu
