// A gradient that lists rows of its parameter and has no others.
#pragma once
#include <cstdint>

namespace danlu {

struct ListedRows {
  int tensor;           // its place in the list of parameters
  void* values;         // [count][elements of a row], in the gradient's dtype
  const int64_t* rows;  // ascending, each once, all of them the parameter's
  int64_t count;
};

}  // namespace danlu
