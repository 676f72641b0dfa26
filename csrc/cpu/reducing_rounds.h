// A step of tensors whose rules reduce, pass by pass over all of them: somebody outside sees their sums, and
// may change them, before the next pass uses them.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../common/coefficient_table.h"
#include "reducing_member.h"
#include "threads.h"

namespace danlu {

class ReducingRounds {
 public:
  // Sums that a tensor has at a stop. of: "rows", "columns", of "both", "averages" of rows; of the "tensor",
  // or of each "row" by itself.
  struct Array {
    const char* of;
    double* values;
    int64_t count;
  };

  void add(int tensor, const Reducer& reducer, const std::array<int64_t, 3>& matrix) {
    members_.push_back(ReducingMember::of(tensor, reducer, matrix));
  }

  // To the first stop: sums of statistics, or sums over tensors of rules that have none.
  void reduce_gradient(const std::vector<Tensor>& tensors, const CoefficientTable& coefficients,
                       int threads) {
    size_t total = 0;
    for (const ReducingMember& m : members_) total += m.scratch_doubles(true);
    scratch_.assign(total, 0.0);
    double* room = scratch_.data();
    for (size_t i = 0; i < members_.size(); i++) {
      ReducingMember& m = members_[i];
      m.place(room, true);
      room += m.scratch_doubles(true);
      m.operands.tensor = tensors[m.tensor];
      m.active = m.operands.tensor.coefficients >= 0;
      if (m.active) m.operands.coefficients = coefficients[m.operands.tensor.coefficients];
    }
    for_tiles(threads, [](const ReducingMember& m, int64_t tile) {
      m.collects() ? m.reducer->reduce_gradient(m.operands, tile) : reduce_norms(m, tile);
    });
    for_members(threads, [](const ReducingMember& m) {
      m.collects() ? m.reducer->sum_statistics(m.operands) : sum(m);
    });
  }

  // To the second stop: sums over tensors of rules that have statistics, too. coefficients: in place of those
  // before.
  void reduce_norms(const CoefficientTable& coefficients, int threads) {
    for (ReducingMember& m : members_)
      if (m.active) m.operands.coefficients = coefficients[m.operands.tensor.coefficients];
    for_members(threads, [](const ReducingMember& m) {
      if (m.collects()) m.reducer->update_factors(m.operands);
    });
    for_tiles(threads, [](const ReducingMember& m, int64_t tile) {
      if (m.collects()) reduce_norms(m, tile);
    });
    for_members(threads, [](const ReducingMember& m) {
      if (m.collects()) sum(m);
    });
  }

  // To the end.
  void apply(int threads) {
    for_members(threads, [](const ReducingMember& m) {
      if (m.reducer->finalize) m.reducer->finalize(m.operands);
    });
    for_tiles(threads,
              [](const ReducingMember& m, int64_t tile) { m.reducer->apply_reduced(m.operands, tile); });
  }

  // Where a tensor leaves what at a stop, 0 or 1, if it takes part; nothing where it passes by. That is as
  // long the same as scratch() is.
  std::vector<Array> sums(int tensor, int stop) {
    for (ReducingMember& m : members_) {
      if (m.tensor != tensor) continue;
      const Tiling& t = m.operands.tiling;
      const Scratch& s = m.operands.scratch;
      std::vector<Array> found;
      const auto take = [&](const char* of, double* values, int64_t count) {
        found.push_back({of, values, count});
      };
      if (m.collects() && stop == 0) {
        if (m.reducer->row_sums) take("rows", s.of_rows, t.batch * t.rows);
        if (m.reducer->column_sums) take("columns", s.of_columns, t.batch * t.columns);
        if (m.reducer->row_sums && m.reducer->column_sums) {
          take("both", s.of_matrices, t.batch);
          take("averages", s.average_sums, t.batch);
        }
      } else if (stop == (m.collects() ? 1 : 0)) {
        if (m.reducer->whole_rows)
          take("row", s.of_tensor, t.batch * t.rows * m.reducer->num_sums);
        else
          for (int j = 0; j < m.reducer->num_sums; j++) take("tensor", s.of_tensor + j, 1);
      }
      return found;
    }
    return {};
  }

  const double* scratch() const { return scratch_.data(); }

  // The sums of a tensor are those of a larger one from now on, in later steps, too.
  void count(int tensor, const Counts& counts) {
    for (ReducingMember& m : members_)
      if (m.tensor == tensor) m.operands.counts = counts;
  }

 private:
  static void reduce_norms(const ReducingMember& m, int64_t tile) {
    if (m.reducer->reduce_row_norms) m.reducer->reduce_row_norms(m.operands, tile);
    if (m.needs_norms()) m.reducer->reduce_norms(m.operands, tile);
  }

  static void sum(const ReducingMember& m) {
    if (m.reducer->sum_tiles) m.reducer->sum_tiles(m.operands);
  }

  template <class See>
  void for_members(int threads, const See& see) {
    parallel_items(int64_t(members_.size()), threads, [&](int64_t i) {
      if (members_[i].active) see(members_[i]);
    });
  }

  template <class See>
  void for_tiles(int threads, const See& see) {
    first_.assign(1, 0);
    for (const ReducingMember& m : members_) first_.push_back(first_.back() + (m.active ? m.tiles() : 0));
    parallel_items(first_.back(), threads, [&](int64_t item) {
      const size_t i = std::upper_bound(first_.begin(), first_.end(), item) - first_.begin() - 1;
      see(members_[i], item - first_[i]);
    });
  }

  std::vector<ReducingMember> members_;
  std::vector<double> scratch_;
  std::vector<int64_t> first_;  // of all tiles, of each member
};

}  // namespace danlu
