#pragma once

#include "noising.h"

// Launch on a stream (cudaStream_t), return the cudaError_t.
extern "C" int braid_launch_noising(const braid::NoisingArguments* arguments, void* stream);
extern "C" int braid_launch_noising_backward(const braid::NoisingGradients* gradients, void* stream);
