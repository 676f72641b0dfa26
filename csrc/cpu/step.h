// A step over CPU tensors: the one parallel region in which all of them are updated.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../common/coefficient_table.h"
#include "../common/listed_rows.h"
#include "kernel.h"
#include "lazy_tensors.h"
#include "reducing_rounds.h"
#include "reducing_tensors.h"
#include "sum_squares.h"
#include "threads.h"

namespace danlu {

// The tensors of all calls are those that were added, in that order; `listed` in the order of the tensors.
class ParallelStep {
 public:
  void add_elementwise(Kernel kernel) {
    kernels_.push_back(kernel);
    elementwise_ = true;
  }

  // matrix: batch, rows, columns.
  void add_reducing(const Reducer& reducer, const std::array<int64_t, 3>& matrix) {
    if (matrix[0] * matrix[1] * matrix[2] > 0) reducing_.add(int(kernels_.size()), reducer, matrix);
    rounds_.add(int(kernels_.size()), reducer, matrix);
    kernels_.push_back(nullptr);
  }

  // all_moments: as LazyTensors has it.
  void add_lazy(Kernel kernel, const std::vector<int64_t>& shape, bool all_moments) {
    lazy_.add(int(kernels_.size()), kernel, shape, all_moments);
    kernels_.push_back(nullptr);
  }

  // After the last one: cuts the tensors into items of about item_size elements, small tensors together.
  void bind(const std::vector<Tensor>& tensors) {
    reducing_.bind();
    chunks_.clear();
    items_ = {0};
    int64_t filled = 0;
    for (size_t i = 0; i < tensors.size(); i++)
      for (int64_t begin = 0; begin < tensors[i].size; begin += item_size) {
        const int64_t end = std::min(tensors[i].size, begin + item_size);
        if (filled + end - begin > item_size && filled > 0) {
          items_.push_back(chunks_.size());
          filled = 0;
        }
        chunks_.push_back({kernels_[i], int32_t(i), begin, end});
        filled += end - begin;
      }
    if (filled > 0) items_.push_back(chunks_.size());
  }

  // Of the gradients, in an order that does not depend on the threads.
  double gradient_squares(const std::vector<Tensor>& tensors, const std::vector<ListedRows>& listed,
                          int threads) {
    const auto lists = [&](int tensor) {
      return std::any_of(listed.begin(), listed.end(), [&](const auto& l) { return l.tensor == tensor; });
    };
    const int64_t items = int64_t(items_.size()) - 1;
    // a core that only reads reaches its speed after some hundred KB
    constexpr int64_t together = 4;
    partial_sums_.assign(items, 0.0);
    parallel_items(divided_up(items, together), threads, [&](int64_t first) {
      for (int64_t item = first * together; item < std::min(items, (first + 1) * together); item++)
        for (size_t c = items_[item]; c < items_[item + 1]; c++) {
          const Tensor& t = tensors[chunks_[c].tensor];
          if (t.coefficients >= 0 && !lists(chunks_[c].tensor))
            partial_sums_[item] += sum_squares(t.g, chunks_[c].begin, chunks_[c].end);
        }
    });
    const double of_lists = lazy_.squares(tensors, listed, threads);
    return std::accumulate(partial_sums_.begin(), partial_sums_.end(), of_lists);
  }

  void run(const std::vector<Tensor>& tensors, const std::vector<ListedRows>& listed,
           const CoefficientTable& coefficients, int threads) {
    reducing_.start(tensors, coefficients, threads);
    run_items(tensors, listed, coefficients, threads, reducing_.items());
  }

  // The same in three parts, between which somebody may change the sums of rules that reduce. The
  // coefficients stay where they are from the first to the last.
  ReducingRounds& rounds() { return rounds_; }

  void apply(const std::vector<Tensor>& tensors, const std::vector<ListedRows>& listed,
             const CoefficientTable& coefficients, int threads) {
    rounds_.apply(threads);
    run_items(tensors, listed, coefficients, threads, 0);
  }

  // Beside parameters, gradients and states.
  int64_t scratch_bytes(int threads) const { return reducing_.scratch_bytes(threads); }

 private:
  static constexpr int64_t item_size = 65536;

  struct Chunk {
    Kernel kernel;
    int32_t tensor;
    int64_t begin, end;
  };

  // The first `reducing` items are those of reducing_.
  void run_items(const std::vector<Tensor>& tensors, const std::vector<ListedRows>& listed,
                 const CoefficientTable& coefficients, int threads, int64_t reducing) {
    lazy_.start(tensors, listed, coefficients, threads);
    const int64_t lazy = lazy_.items();
    const int64_t elementwise = elementwise_ ? int64_t(items_.size()) - 1 : 0;
    parallel_items(reducing + lazy + elementwise, threads, [&](int64_t item) {
      if (item < reducing) return reducing_.work(item);
      item -= reducing;
      if (item < lazy) return lazy_.work(item);
      item -= lazy;
      for (size_t c = items_[item]; c < items_[item + 1]; c++) {
        const Chunk& chunk = chunks_[c];
        const Tensor& t = tensors[chunk.tensor];
        if (t.coefficients >= 0 && chunk.kernel)
          chunk.kernel(t, chunk.begin, chunk.end, coefficients[t.coefficients]);
      }
    });
  }

  std::vector<Kernel> kernels_;  // null where the rule reduces or the tensor is lazy
  bool elementwise_ = false;     // whether any rule is
  ReducingTensors reducing_;
  ReducingRounds rounds_;
  LazyTensors lazy_;
  std::vector<Chunk> chunks_;
  std::vector<size_t> items_;         // item i is chunks [items_[i], items_[i + 1])
  std::vector<double> partial_sums_;  // of each item
};

}  // namespace danlu
