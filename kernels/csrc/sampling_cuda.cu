#include "launch.h"
// The emulator's words for CUDA's come first.
#include "sampling.cuh"
#include "sampling_cuda.h"

using namespace braid;

extern "C" int braid_launch_sampling(const SamplingArguments* arguments, void* stream) {
  return with_type(arguments->bfloat16, [&](auto type) {
    return launch(sampling_kernel<typename decltype(type)::type>, blocks_for(arguments->count, 1), THREADS, stream,
                  *arguments);
  });
}
