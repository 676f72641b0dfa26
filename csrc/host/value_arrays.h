// The values of a tensor by number: parameter, gradient, states.
#pragma once
#include <utility>
#include <vector>

#include "../common/tensor_list.h"

namespace danlu {

inline Storage& value_of(Tensor& t, int which) {
  return which == 0 ? t.p : which == 1 ? t.g : t.states[which - 2];
}

// The arrays that lie in the state, as (value, array): those of states, then the parameter's further ones.
inline std::vector<std::pair<int, int>> arrays_in_state(Tensor& t, int num_states) {
  std::vector<std::pair<int, int>> found;
  for (int value = 2; value < 2 + num_states; value++)
    for (int array = 0; array < info_of(value_of(t, value).format).num_arrays; array++)
      found.emplace_back(value, array);
  for (int array = 1; array < info_of(t.p.format).num_arrays; array++) found.emplace_back(0, array);
  return found;
}

}  // namespace danlu
