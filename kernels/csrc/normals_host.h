#pragma once

#include "instruction_sets.h"
#include "normals.h"

namespace braid {

struct HostNormals {
  void (*draw)(const NormalArguments&, int64_t first, int64_t last);  // positions first to last
};
BRAID_HOST(HostNormals, normals)

}  // namespace braid
