#pragma once

#include "normals.h"

// Launches on a stream (cudaStream_t), returns the cudaError_t.
extern "C" int braid_launch_normals(const braid::NormalArguments* arguments, void* stream);
