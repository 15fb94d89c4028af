#pragma once

#include "cross_entropy.h"
#include "instruction_sets.h"

namespace braid {

struct HostCrossEntropy {
  // Rows first to last.
  void (*rows)(const CrossEntropyArguments&, int64_t first, int64_t last);
};
BRAID_HOST(HostCrossEntropy, cross_entropy)

}  // namespace braid
