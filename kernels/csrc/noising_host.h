#pragma once

#include "instruction_sets.h"
#include "noising.h"

namespace braid {

struct HostNoising {
  // Positions first to last. False: some token has no row in the table (nothing is read there).
  bool (*forward)(const NoisingArguments&, int64_t first, int64_t last);
  // All but the table's gradient, positions first to last.
  void (*backward)(const NoisingGradients&, int64_t first, int64_t last);
  // The table's gradient, work items first to last of rows * length * ceil(channels / 64).
  void (*table_gradient)(const NoisingGradients&, int64_t first, int64_t last);
};
BRAID_HOST(HostNoising, noising)

}  // namespace braid
