// Kernels that show that the emulator does what a GPU does.
#pragma once
#include <utility>
#include <vector>

namespace emulator {

std::vector<double> block_sums(const std::vector<double>& values, unsigned threads);
std::vector<float> transposed(const std::vector<float>& matrix, unsigned size);
void torn_barrier();
void torn_shuffle();
void misaligned();
std::pair<float, float> overlapping();
void impatient();

}  // namespace emulator
