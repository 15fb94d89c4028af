#include "launch.h"
// The emulator's words for CUDA's come first.
#include "normals.cuh"
#include "normals_cuda.h"

using namespace braid;

extern "C" int braid_launch_normals(const NormalArguments* arguments, void* stream) {
  const int64_t num_blocks = (arguments->first_channel % 4 + arguments->channels + 3) / 4;
  const unsigned blocks = blocks_for(arguments->rows * arguments->length * num_blocks, THREADS);
  return launch(normals_kernel, blocks, THREADS, stream, *arguments);
}
