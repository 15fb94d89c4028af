#pragma once

#include "instruction_sets.h"
#include "sampling.h"

namespace braid {

struct HostSampling {
  // Draws first to last.
  void (*draw)(const SamplingArguments&, int64_t first, int64_t last);
};
BRAID_HOST(HostSampling, sampling)

}  // namespace braid
