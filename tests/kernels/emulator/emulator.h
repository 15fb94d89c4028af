// Runs CUDA kernels on the CPU, for tests: each CUDA thread is a fiber (ucontext), blocks run one after the other, and
// barriers and shuffles wait until every thread of the block or the warp has come to them. One OS thread; deterministic.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((may_alias));
struct float4 {
  float x, y, z, w;
} __attribute__((may_alias));
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace braid::emulator {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;

struct Fiber {
  ucontext_t context;
  bool done;
  uint64_t block_barriers, warp_barriers;  // how many of each it has come to
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline std::vector<uint64_t> lanes;  // what each thread gives to a shuffle
inline std::function<void()> body;
inline int current;

inline void pause() {
  swapcontext(&fibers[current].context, &scheduler);
  threadIdx = dim3(current);
}
inline void enter() {
  body();
  fibers[current].done = true;
  pause();
}
// Until all fibers first to last have come to as many of these barriers, or have ended.
inline void wait(uint64_t Fiber::*barriers, int first, int last) {
  const uint64_t mine = ++(fibers[current].*barriers);
  for (;;) {
    bool all = true;
    for (int i = first; i < last; ++i) all &= fibers[i].done || fibers[i].*barriers >= mine;
    if (all) return;
    pause();
  }
}
inline void run_block(int threads) {
  fibers.assign(threads, Fiber{});
  for (int i = 0; i < threads; ++i) {
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = stacks.data() + i * STACK;
    fibers[i].context.uc_stack.ss_size = STACK;
    makecontext(&fibers[i].context, enter, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].done) continue;
      alive = true;
      current = i;
      threadIdx = dim3(i);
      swapcontext(&scheduler, &fibers[i].context);
    }
  }
}

}  // namespace braid::emulator

inline void __syncthreads() { braid::emulator::wait(&braid::emulator::Fiber::block_barriers, 0, blockDim.x); }
template <class T>
T __shfl_xor_sync(uint32_t, T value, int distance) {
  using namespace braid::emulator;
  static_assert(sizeof(T) <= 8, "the emulator exchanges 64 bits");
  const int me = current, first = me / WARP * WARP;
  __builtin_memcpy(&lanes[me], &value, sizeof(T));
  wait(&Fiber::warp_barriers, first, first + WARP);
  T other;
  __builtin_memcpy(&other, &lanes[me ^ distance], sizeof(T));
  wait(&Fiber::warp_barriers, first, first + WARP);
  return other;
}
inline int __any_sync(uint32_t lanes, int predicate) {
  for (int distance = braid::emulator::WARP / 2; distance; distance /= 2)
    predicate |= __shfl_xor_sync(lanes, predicate, distance);
  return predicate != 0;
}
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
[[noreturn]] inline void __trap() { std::abort(); }

namespace braid {

inline int num_processors() { return 1; }

template <class Kernel, class... Arguments>
int launch(Kernel kernel, dim3 blocks, int threads, void*, const Arguments&... arguments) {
  gridDim = blocks;
  blockDim = dim3(threads);
  emulator::stacks.resize(threads * emulator::STACK);
  emulator::lanes.assign(threads, 0);
  emulator::body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < blocks.y; ++y)
    for (unsigned x = 0; x < blocks.x; ++x) {
      blockIdx = dim3(x, y);
      emulator::run_block(threads);
    }
  return 0;
}

}  // namespace braid
