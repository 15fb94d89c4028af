#include "instruction_sets.h"

#include <cstdlib>
#include <cstring>

namespace braid {

InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    InstructionSet best = InstructionSet::generic;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) best = InstructionSet::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = InstructionSet::avx512;
#endif
    const char* limit = std::getenv("BRAID_KERNELS_ISA");
    if (limit && !std::strcmp(limit, "generic")) return InstructionSet::generic;
    if (limit && !std::strcmp(limit, "avx2") && best == InstructionSet::avx512) return InstructionSet::avx2;
    return best;
  }();
  return chosen;
}

}  // namespace braid
