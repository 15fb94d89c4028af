#include "launch.h"
// The emulator's words for CUDA's come first.
#include "cross_entropy.cuh"
#include "cross_entropy_cuda.h"

using namespace braid;

extern "C" int braid_launch_cross_entropy(const CrossEntropyArguments* arguments, void* stream) {
  return with_type(arguments->bfloat16, [&](auto type) {
    return launch(cross_entropy_kernel<typename decltype(type)::type>, blocks_for(arguments->rows, 1), THREADS, stream, *arguments);
  });
}
