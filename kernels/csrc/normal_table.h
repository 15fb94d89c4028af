// The committed table of the normal quantile, once for each kind of code.
#pragma once

#include "core.h"

namespace braid {

#if defined(__CUDACC__)
static __device__ const Segment NORMAL_TABLE[NUM_SEGMENTS] = {
#else
static constexpr Segment NORMAL_TABLE[NUM_SEGMENTS] = {
#endif
#include "../normal_table.inc"
};

}  // namespace braid
