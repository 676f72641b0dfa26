// The tensors of a step whose rules reduce, and who works on them when: all passes over a tensor follow one
// another while it is in the caches. Large tensors are shared by all threads, the others taken whole.
#pragma once
#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "../common/coefficient_table.h"
#include "reducing_member.h"

namespace danlu {

class ReducingTensors {
 public:
  // matrix: batch, rows, columns of a tensor that is not empty.
  void add(int tensor, const Reducer& reducer, const std::array<int64_t, 3>& matrix) {
    members_.push_back(Member::of(tensor, reducer, matrix));
  }

  // After the last add().
  void bind() {
    items_.clear();
    std::vector<int> alone;
    int shared = 0;
    for (size_t i = 0; i < members_.size(); i++) {
      const Tiling& t = members_[i].operands.tiling;
      size_t& room = is_shared(t) ? shared_doubles_ : own_doubles_;
      room = std::max(room, members_[i].scratch_doubles(false));
      if (!is_shared(t)) {
        alone.push_back(int(i));
        continue;
      }
      const int order = shared++;
      for (int pass = 0; pass < passes; pass++)
        for (int64_t tile = 0; tile < count(t); tile++)
          items_.push_back({int(i), 1, pass, pass == 1 ? count(t) - 1 - tile : tile, order});
    }
    progress_.reset(new Progress[shared]);
    // the largest first, so that all threads end together; small ones in memory's order, in groups
    std::stable_sort(alone.begin(), alone.end(), [&](int a, int b) {
      const auto key = [&](int i) { return std::max(members_[i].elements(), group_size); };
      return key(a) > key(b);
    });
    order_ = alone;
    int64_t filled = 0;
    for (size_t i = 0; i < alone.size(); i++) {
      const int64_t size = members_[alone[i]].elements();
      if (i > 0 && filled + size <= group_size) {
        items_.back().members++;
        filled += size;
      } else {
        items_.push_back({int(i), 1, every_pass, 0, 0});
        filled = size;
      }
    }
    shared_scratch_.assign(size_t(std::min(shared, most_shared)) * shared_doubles_, 0.0);
  }

  int64_t items() const { return int64_t(items_.size()); }

  // Bytes that the passes need beside the tensors.
  int64_t scratch_bytes(int threads) const {
    return int64_t(sizeof(double)) * (shared_scratch_.size() + size_t(threads) * own_doubles_);
  }

  // Before the items of a step.
  void start(const std::vector<Tensor>& tensors, const CoefficientTable& coefficients, int threads) {
    own_scratch_.resize(std::max(own_scratch_.size(), size_t(threads) * own_doubles_));
    int shared = 0;
    for (Member& m : members_) {
      m.operands.tensor = tensors[m.tensor];
      m.active = m.operands.tensor.coefficients >= 0;
      if (m.active) m.operands.coefficients = coefficients[m.operands.tensor.coefficients];
      if (!is_shared(m.operands.tiling)) continue;
      m.place(&shared_scratch_[size_t(shared % most_shared) * shared_doubles_], false);
      progress_[shared].left = count(m.operands.tiling);
      progress_[shared++].pass = m.active ? 0 : passes;
    }
  }

  void work(int64_t index) {
    const WorkItem& item = items_[index];
    if (item.pass != every_pass) {
      work_together(item);
      return;
    }
    double* scratch = own_scratch_.data() + size_t(omp_get_thread_num()) * own_doubles_;
    for (int i = item.first; i < item.first + item.members; i++) {
      Member& m = members_[order_[i]];
      if (!m.active) continue;
      m.place(scratch, false);
      m.operands.next = {};
      if (i + 1 < item.first + item.members && members_[order_[i + 1]].active) {
        const Operands& next = members_[order_[i + 1]].operands;
        m.operands.next = next.fits_caches ? next.tensor.g : Storage{};
        m.operands.next_size = next.tensor.size;
      }
      const int64_t tiles = count(m.operands.tiling);
      for (int pass = 0; pass < passes; pass++) {
        // each pass begins where the last one ended, at what is still in the caches
        for (int64_t tile = 0; tile < tiles; tile++) visit(m, pass, pass == 1 ? tiles - 1 - tile : tile);
        conclude(m, pass);
      }
    }
  }

 private:
  static constexpr int64_t shared_size = int64_t{1} << 20, group_size = 65536;
  static constexpr int passes = 3, every_pass = -1;
  static constexpr int most_shared = 2;  // that threads are at work on at once

  using Member = ReducingMember;

  struct WorkItem {
    int first, members;  // of order_, or one of members_ if it is shared
    int pass;
    int64_t tile;
    int order;  // among the shared ones
  };

  struct Progress {
    std::atomic<int> pass{0};  // the one whose tiles may be taken
    std::atomic<int64_t> left{0};
  };

  static bool is_shared(const Tiling& t) { return t.batch * t.rows * t.columns >= shared_size; }

  static void visit(const Member& m, int pass, int64_t tile) {
    const Reducer& r = *m.reducer;
    if (pass == 0 && m.collects()) r.reduce_gradient(m.operands, tile);
    if (pass == 1 && m.needs_norms()) r.reduce_norms(m.operands, tile);
    if (pass == 2) r.apply(m.operands, tile);
  }

  static void conclude(const Member& m, int pass) {
    const Reducer& r = *m.reducer;
    if (pass == 0 && m.collects()) {
      r.sum_statistics(m.operands);
      r.update_factors(m.operands);
    }
    if (pass == 1 && r.finalize) {
      r.sum_tiles(m.operands);
      r.finalize(m.operands);
    }
  }

  // A item waits only for items that were taken before it.
  void work_together(const WorkItem& item) {
    const Member& m = members_[item.first];
    if (!m.active) return;
    Progress& progress = progress_[item.order];
    if (item.order >= most_shared) wait(progress_[item.order - most_shared], passes);  // has its scratch
    wait(progress, item.pass);
    visit(m, item.pass, item.tile);
    if (progress.left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    conclude(m, item.pass);
    progress.left.store(count(m.operands.tiling), std::memory_order_relaxed);
    progress.pass.store(item.pass + 1, std::memory_order_release);
  }

  static void wait(const Progress& progress, int pass) {
    for (int spins = 0; progress.pass.load(std::memory_order_acquire) < pass; spins++)
      if (spins > 1000) std::this_thread::yield();
  }

  std::vector<Member> members_;
  std::vector<int> order_;  // those that are not shared, the largest first
  std::vector<WorkItem> items_;
  std::unique_ptr<Progress[]> progress_;
  std::vector<double> shared_scratch_, own_scratch_;
  size_t shared_doubles_ = 0, own_doubles_ = 0;
};

}  // namespace danlu
