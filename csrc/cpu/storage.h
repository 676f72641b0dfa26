// Storage formats on the CPU: fp32 is used where it lies, 16-bit values pass through a buffer in the
// first-level cache. One rule loop thus serves every combination of dtypes; the conversions cost less than
// the memory traffic they wait for.
#pragma once
#include "../common/tensor_list.h"

namespace danlu {
namespace DANLU_ISA {

// To fp32 and back, in conversions.h: compiled once for all rules of an instruction set, since a copy in
// every loop is most of what there is to compile.
void widen(const bf16* from, float* to, int64_t n);
void widen(const f16* from, float* to, int64_t n);
void narrow(const float* from, bf16* to, int64_t n);
void narrow(const float* from, f16* to, int64_t n);

// One stored array, seen as fp32 block by block.
class Lane {
 public:
  static constexpr int64_t buffer_size = 1024;  // four lanes of 4 KB stay in a 32 KB cache

  explicit Lane(Storage storage) : storage_(storage) {}

  bool direct() const { return storage_.dtype == Dtype::f32; }

  float* load(int64_t at, int64_t n) {
    switch (storage_.dtype) {
      case Dtype::bf16:
        widen(static_cast<const bf16*>(storage_.data) + at, buffer_, n);
        return buffer_;
      case Dtype::f16:
        widen(static_cast<const f16*>(storage_.data) + at, buffer_, n);
        return buffer_;
      case Dtype::f32:
        break;
    }
    return static_cast<float*>(storage_.data) + at;
  }

  // what load() gave goes back, rounded to nearest even; nothing to do where it was updated in place
  void store(int64_t at, int64_t n) {
    switch (storage_.dtype) {
      case Dtype::bf16:
        return narrow(buffer_, static_cast<bf16*>(storage_.data) + at, n);
      case Dtype::f16:
        return narrow(buffer_, static_cast<f16*>(storage_.data) + at, n);
      case Dtype::f32:
        break;
    }
  }

 private:
  Storage storage_;
  alignas(64) float buffer_[buffer_size];
};

}  // namespace DANLU_ISA
}  // namespace danlu
