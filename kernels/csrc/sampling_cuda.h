#pragma once

#include "sampling.h"

// Launch on a stream (cudaStream_t), return the cudaError_t.
extern "C" int braid_launch_sampling(const braid::SamplingArguments* arguments, void* stream);
