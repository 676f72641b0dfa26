// The instruction sets that every rule is compiled for; CMakeLists.txt has their flags.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel.h"

namespace danlu {

// generated, see cpu/rules.cpp.in
std::vector<CpuRule> rules_baseline();
std::vector<CpuRule> rules_avx2();
std::vector<CpuRule> rules_avx512();

struct InstructionSet {
  std::string name;
  std::vector<CpuRule> rules;
};

// Those that this machine can run, the fastest first.
inline const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) found.push_back({"avx512", rules_avx512()});
    if (avx2) found.push_back({"avx2", rules_avx2()});
#endif
    found.push_back({"baseline", rules_baseline()});
    return found;
  }();
  return sets;
}

// nullptr if there is no such rule
inline const CpuRule* find_rule(const std::string& rule, const std::string& instruction_set) {
  for (const InstructionSet& set : instruction_sets()) {
    if (set.name != instruction_set) continue;
    for (const CpuRule& candidate : set.rules)
      if (rule == candidate.info.name) return &candidate;
    return nullptr;
  }
  throw std::invalid_argument("instruction set must be one that this machine has, got " + instruction_set);
}

}  // namespace danlu
