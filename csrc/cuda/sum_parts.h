// Where a step stops: what tiles and chunks have left becomes sums of tensors.
#pragma once
#include <cstdint>
#include <string>

namespace danlu {

// Sums of one kind of one tensor; the fields are those of schedule.Summation, which describes them.
#define SUMMATION(...)   \
  struct Summation {     \
    int64_t __VA_ARGS__; \
  };                     \
  constexpr const char* summation_fields = #__VA_ARGS__
SUMMATION(to, tensor, first, sums, run, run_stride, parts, stride, times, times_stride, together);

// Enqueues all summations of a list on a stream. name: of its first parameter; summations, scratch,
// addresses (as AddressList::table() has them, of num_tensors with num_formats formats each): on the device,
// and there places: of each block the summation, then of each which of its blocks it is.
void sum_parts(const std::string& name, int device, uintptr_t cuda_stream, uintptr_t summations,
               uintptr_t places, int64_t blocks, uintptr_t scratch, uintptr_t addresses, int num_tensors,
               int num_formats);

}  // namespace danlu
