#pragma once

#include "cross_entropy.h"

// Launches on a stream (cudaStream_t), returns the cudaError_t.
extern "C" int braid_launch_cross_entropy(const braid::CrossEntropyArguments* arguments, void* stream);
