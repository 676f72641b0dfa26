// Formats by the names that Python has for them.
#pragma once
#include <iterator>
#include <stdexcept>
#include <string>

#include "formats.h"

namespace danlu {

inline Format find_format(const std::string& name) {
  const auto& infos = FormatTable<AllFormats>::infos;
  for (size_t i = 0; i < std::size(infos); i++)
    if (name == infos[i].name) return Format(i);
  throw std::invalid_argument("no storage format " + name);
}

}  // namespace danlu
