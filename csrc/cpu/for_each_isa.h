// FOR_EACH_ISA in front of a static function: compiled for each instruction set, of which the loader takes
// the best. For loops that are no rule's; rules are compiled by CMakeLists.txt.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_ISA
#endif
