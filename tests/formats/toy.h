// Formats for tests, see tests/toy_formats.py. This is all C++ that a format needs.
#pragma once

namespace danlu {

// The halves of an fp32 number, in two arrays.
struct Halves {
  static constexpr const char* name = "halves";
  using Arrays = Types<bf16, int16_t>;
  RULE_FN float decode(bf16 high, int16_t low) {
    return as_float(uint32_t(high.bits) << 16 | uint32_t(uint16_t(low)));
  }
  RULE_FN void encode(float x, bf16& high, int16_t& low) {
    high = {uint16_t(as_bits(x) >> 16)};
    low = int16_t(as_bits(x) & 0xffffu);
  }
};

// The bits of an fp32 number, changed by where it is in its tensor.
struct Marked {
  static constexpr const char* name = "marked";
  static constexpr bool indexed = true;
  using Arrays = Types<int32_t>;
  RULE_FN uint32_t mark(int64_t index) { return uint32_t(uint64_t(index + 1) * 0x9e3779b97f4a7c15u >> 32); }
  RULE_FN float decode(int64_t index, int32_t x) { return as_float(uint32_t(x) ^ mark(index)); }
  RULE_FN void encode(int64_t index, float x, int32_t& to) { to = int32_t(as_bits(x) ^ mark(index)); }
};

using MoreFormats = Types<Halves, Marked>;
using MoreCombinations = Types<Formats<Halves, F32, Halves, Halves>, Formats<F32, F32, Marked, Halves>>;

}  // namespace danlu
