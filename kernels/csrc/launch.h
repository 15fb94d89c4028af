// Launching kernels from a *_cuda.cu file; the emulator of the tests has its own `launch`.
#pragma once

#include "core.h"

#if defined(BRAID_EMULATOR)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace braid {

// Blocks to each multiprocessor: enough to fill it, few enough that filling shared memory costs next to nothing.
constexpr int BLOCKS_PER_PROCESSOR = 8;

#if !defined(BRAID_EMULATOR)
inline int num_processors() {
  int device = 0, number = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, device);
  return number;
}

// The cudaError_t of the launch.
template <class Kernel, class... Arguments>
int launch(Kernel kernel, dim3 blocks, int threads, void* stream, const Arguments&... arguments) {
  kernel<<<blocks, threads, 0, (cudaStream_t)stream>>>(arguments...);
  return (int)cudaGetLastError();
}
#endif

// Blocks for `count` items, `per_block` of them each, that go on with what no block has begun.
inline unsigned blocks_for(int64_t count, int64_t per_block) {
  const int64_t needed = (count + per_block - 1) / per_block, most = (int64_t)num_processors() * BLOCKS_PER_PROCESSOR;
  return (unsigned)(needed < most ? needed : most);
}

// Run-time choices as types: use(Type<float>{}), use(Flag<true>{}).
template <class T>
struct Type {
  using type = T;
};
template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};
template <class Use>
int with_type(bool is_bfloat16, const Use& use) {
  return is_bfloat16 ? use(Type<bfloat16>{}) : use(Type<float>{});
}
template <class Use>
int with_flag(bool flag, const Use& use) {
  return flag ? use(Flag<true>{}) : use(Flag<false>{});
}

}  // namespace braid
