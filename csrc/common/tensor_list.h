// What an engine sees of the tensors of a step.
#pragma once
#include <cstdint>

#include "formats.h"

namespace danlu {

constexpr int max_states = 4;

// A number for each element of a tensor, in as many arrays as its format has.
struct Storage {
  void* data[max_arrays];
  Format format;
};

// From the element on that lies so many behind the first, or before it.
inline Storage moved(Storage x, int64_t by) {
  const FormatInfo& format = info_of(x.format);
  for (int i = 0; i < format.num_arrays; i++)
    x.data[i] = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(x.data[i]) +
                                        uintptr_t(by * format.arrays[i].bytes));
  return x;
}

// Every array of it begins at an address.
inline void place_at(Storage& x, void* address) {
  for (void*& data : x.data) data = address;
}

struct Tensor {
  Storage p, g, states[max_states];
  int64_t size;
  int64_t first;         // row-major place of its first element in the parameter
  int32_t coefficients;  // their index; negative: no gradient, leave it alone
};

// Calls see(word, address) for every array of a tensor: first those of parameter, gradient and states, as
// lists of addresses have them, then from word `further` on what arrays their formats have besides.
template <class See>
inline void for_arrays(const Tensor& t, int num_states, int further, const See& see) {
  const Storage* values[2 + max_states] = {&t.p, &t.g};
  for (int j = 0; j < num_states; j++) values[2 + j] = &t.states[j];
  for (int i = 0; i < 2 + num_states; i++) {
    see(i, values[i]->data[0]);
    for (int array = 1; array < info_of(values[i]->format).num_arrays; array++)
      see(further++, values[i]->data[array]);
  }
}

// How many arrays there are besides the first of each.
inline int num_further(const Tensor& t, int num_states) {
  int count = info_of(t.p.format).num_arrays + info_of(t.g.format).num_arrays - 2;
  for (int j = 0; j < num_states; j++) count += info_of(t.states[j].format).num_arrays - 1;
  return count;
}

// Whether a format asks for places.
inline bool any_indexed(const Tensor& t, int num_states) {
  bool indexed = info_of(t.p.format).indexed || info_of(t.g.format).indexed;
  for (int j = 0; j < num_states; j++) indexed |= info_of(t.states[j].format).indexed;
  return indexed;
}

// The engine's own words in front of every coefficients.
struct CoefficientsHeader {
  float factor;        // multiplies the gradient
  float store_params;  // 0: states move, the parameter does not
};

struct RuleInfo {
  const char* name;
  const char* coeff_names;  // as COEFFS lists them
  int num_states, num_coeffs;

  // floats of a coefficients
  constexpr int num_floats() const { return int(sizeof(CoefficientsHeader) / sizeof(float)) + num_coeffs; }
};

template <class Rule>
constexpr RuleInfo rule_info(const char* name) {
  return {name, Rule::coeff_names, Rule::num_states, int(sizeof(typename Rule::Coeffs) / sizeof(float))};
}

}  // namespace danlu
