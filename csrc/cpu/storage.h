// Storage formats on the CPU: fp32 is used where it lies, numbers of other formats pass through a buffer in
// the first-level cache. One rule loop thus serves every combination of formats; the conversions cost less
// than the memory traffic they wait for.
#pragma once
#include "../common/tensor_list.h"

namespace danlu {
namespace DANLU_ISA {

// Of n numbers from element `at` on, whose places in the parameter begin at `index`; null for fp32.
struct Conversions {
  void (*widen)(const Storage& from, int64_t at, int64_t index, int64_t n, float* to);
  void (*narrow)(const float* from, const Storage& to, int64_t at, int64_t index, int64_t n);
};

// In conversions.h: compiled once for all rules of an instruction set, since a copy in every loop is most of
// what there is to compile.
const Conversions& conversions_of(Format format);

// The arrays of a number for each element, seen as fp32 block by block.
class Lane {
 public:
  static constexpr int64_t buffer_size = 1024;  // four lanes of 4 KB stay in a 32 KB cache

  Lane(const Storage& storage, int64_t first)
      : storage_(storage), first_(first), conversions_(conversions_of(storage.format)) {}

  bool direct() const { return !conversions_.widen; }

  float* load(int64_t at, int64_t n) {
    if (direct()) return static_cast<float*>(storage_.data[0]) + at;
    conversions_.widen(storage_, at, first_ + at, n, buffer_);
    return buffer_;
  }

  // what load() gave goes back, rounded as the format says; nothing to do where it was updated in place
  void store(int64_t at, int64_t n) {
    if (!direct()) conversions_.narrow(buffer_, storage_, at, first_ + at, n);
  }

 private:
  Storage storage_;
  int64_t first_;  // place of element 0 in the parameter
  const Conversions& conversions_;
  alignas(64) float buffer_[buffer_size];
};

}  // namespace DANLU_ISA
}  // namespace danlu
