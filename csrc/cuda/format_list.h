// The formats that a kernel was compiled for, at run time.
#pragma once
#include <string>
#include <vector>

#include "../common/formats.h"

namespace danlu {

// Of parameter, gradient and states.
using FormatList = std::vector<Format>;

template <class... F>
FormatList formats_of(Formats<F...>) {
  return {format_of<F>...};
}

// The one of some kernels for formats of these names; nullptr if there is none.
template <class Kernel>
const Kernel* find_kernel(const std::vector<Kernel>& kernels, const std::vector<std::string>& names) {
  for (const Kernel& kernel : kernels) {
    bool same = kernel.formats.size() == names.size();
    for (size_t i = 0; same && i < names.size(); i++) same = names[i] == info_of(kernel.formats[i]).name;
    if (same) return &kernel;
  }
  return nullptr;
}

}  // namespace danlu
