// The part of CUDA that the search uses, on one CPU thread: every GPU thread is a fiber, scheduled in an
// order drawn from a seed, so that a missing barrier shows as a wrong answer, a NaN or a deadlock.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// blocks of a kernel with static shared memory run one after another
#define __shared__ static
#define __align__(n)

using std::isfinite;
using std::isnan;

inline dim3 gridDim, blockDim;

namespace emulated {

struct Barrier {
  int count = 0;
  unsigned long generation = 0;
};

// an mbarrier: phases end when nobody is pending and no bytes are
struct Phases {
  int arrivals = 0, pending = 0, bytes = 0;
  unsigned long phase = 0;
  void settle() {
    if (pending == 0 && bytes == 0) phase++, pending = arrivals;
  }
};

struct Block {
  dim3 index;
  std::unique_ptr<char[]> storage;
  char* memory = nullptr;
  int rank = 0;
  int alive = 0;  // threads that have not left
  Barrier all;
  std::map<int, Barrier> named;
  std::map<unsigned, Phases> phases;
};

struct Warp {
  Barrier barrier;
  unsigned long long slots[32];
  unsigned words[32][6];
  int lanes = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  int linear = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool done = false;
  std::function<bool()> ready;
  std::vector<std::vector<std::function<void()>>> groups;  // of wgmma, committed
  std::vector<std::function<void()>> open;                 // of wgmma, not yet
};

inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline std::vector<Block>* cluster = nullptr;
inline Barrier cluster_barrier;
inline std::vector<std::function<void()>> transfers;  // of TMA, under way
inline std::mt19937 dice;
// what is asynchronous happens at random, as soon as it may, or as late as it can
enum Pace { kAny, kSoon, kLate };
inline Pace copy_pace = kAny, product_pace = kAny;
inline std::function<void()> body;
inline int compute_major = 9, compute_minor = 0, processors = 4, block_shared = 232448;

inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s\n", what);
  exit(1);
}

inline void block_until(std::function<bool()> ready) {
  if (ready()) return;
  current->ready = std::move(ready);
  swapcontext(&current->context, &scheduler);
}

inline void meet(Barrier& b, int count) {
  const unsigned long generation = b.generation;
  if (++b.count == count) {
    b.count = 0;
    b.generation++;
    return;
  }
  block_until([&b, generation] { return b.generation != generation; });
}

inline void meet_warp() { meet(current->warp->barrier, current->warp->lanes); }

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  Warp& w = *current->warp;
  const int lane = current->linear % 32;
  memcpy(&w.slots[lane], &value, sizeof(T));
  meet_warp();
  T result;
  memcpy(&result, &w.slots[from], sizeof(T));
  meet_warp();
  return result;
}

inline unsigned vote(bool value) {
  Warp& w = *current->warp;
  w.slots[current->linear % 32] = value;
  meet_warp();
  unsigned result = 0;
  for (int lane = 0; lane < w.lanes; ++lane) result |= (unsigned)(w.slots[lane] != 0) << lane;
  meet_warp();
  return result;
}

inline void entry() {
  body();
  if (!current->groups.empty() || !current->open.empty()) fail("wgmma is under way at the end of a thread");
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void run_cluster(std::vector<Block>& blocks, int threads) {
  cluster = &blocks;
  cluster_barrier = {};
  std::vector<Fiber> fibers(blocks.size() * threads);
  std::vector<Warp> warps(blocks.size() * ((threads + 31) / 32));
  size_t next = 0;
  for (Block& block : blocks)
    for (int t = 0; t < threads; ++t) {
      Fiber& f = fibers[next];
      f.linear = t;
      f.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
      f.block = &block;
      f.warp = &warps[next / threads * ((threads + 31) / 32) + t / 32];
      f.warp->lanes++;
      block.alive++;
      f.stack = std::make_unique<char[]>(96 << 10);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = 96 << 10;
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
      next++;
    }
  size_t alive = fibers.size();
  // one block of a cluster may lag behind the other
  const size_t lagging = dice() % 3;
  int idle = 0;
  while (alive > 0) {
    bool moved = false;
    while (!transfers.empty() && (copy_pace == kSoon || (copy_pace == kAny ? dice() % 2 == 0 : idle > 8))) {
      const size_t at = dice() % transfers.size();
      const auto transfer = transfers[at];
      transfers.erase(transfers.begin() + (long)at);
      transfer();
      moved = true;
    }
    const size_t start = dice() % fibers.size();
    std::vector<bool> slow(warps.size());
    for (size_t w = 0; w < warps.size(); ++w) {
      const bool lags = w / (warps.size() / blocks.size()) == lagging;
      slow[w] = dice() % 8 >= (lags ? 1 : 6);
    }
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& f = fibers[(start + i) % fibers.size()];
      if (f.done || slow[(size_t)(f.warp - warps.data())]) continue;
      if (f.ready && !f.ready()) continue;
      f.ready = nullptr;
      current = &f;
      swapcontext(&scheduler, &f.context);
      moved = true;
      alive -= f.done;
      f.block->alive -= f.done;
    }
    idle = moved ? 0 : idle + 1;
    if (idle > 400) fail("deadlock");
  }
  if (!transfers.empty()) fail("a copy is under way to a block that has left");
}

template <class Kernel, class... Arguments>
void run(const cudaLaunchConfig_t& config, Kernel kernel, Arguments... arguments) {
  ::gridDim = config.gridDim;
  ::blockDim = config.blockDim;
  const unsigned wide = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  const int threads = (int)(blockDim.x * blockDim.y * blockDim.z);
  body = [&] { kernel(arguments...); };
  copy_pace = (Pace)(dice() % 3);
  product_pace = (Pace)(dice() % 3);
  if (gridDim.x % wide) fail("the grid is not a multiple of the cluster");
  if ((long)config.dynamicSmemBytes > block_shared) fail("too much shared memory");
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; x += wide) {
      std::vector<Block> blocks(wide);
      for (unsigned r = 0; r < wide; ++r) {
        Block& b = blocks[r];
        b.index = dim3(x + r, y, 0);
        b.rank = (int)r;
        b.storage = std::make_unique<char[]>(config.dynamicSmemBytes + 2048);
        b.memory = (char*)(((size_t)b.storage.get() + 1023) / 1024 * 1024);
        // NaN, whatever it is read as
        memset(b.memory, 0xff, config.dynamicSmemBytes);
      }
      run_cluster(blocks, threads);
    }
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::current->block->index)

inline void __syncthreads() {
  emulated::meet(emulated::current->block->all, (int)(blockDim.x * blockDim.y * blockDim.z));
}
inline void __syncwarp() { emulated::meet_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return emulated::exchange(v, (emulated::current->linear % 32) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  return emulated::exchange(v, lane);
}
inline unsigned __ballot_sync(unsigned, bool v) { return emulated::vote(v); }
inline bool __any_sync(unsigned, bool v) { return emulated::vote(v) != 0; }
inline bool __all_sync(unsigned, bool v) { return emulated::vote(!v) == 0; }
inline void __threadfence() {}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p += v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  if (old < v) *p = v;
  return old;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
template <class To, class From>
To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  memcpy(&r, &v, sizeof r);
  return r;
}
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline double __longlong_as_double(long long v) { return bits_as<double>(v); }
inline long long __double_as_longlong(double v) { return bits_as<long long>(v); }
inline float __double2float_ru(double v) {
  const float f = (float)v;
  return (double)f < v ? nextafterf(f, INFINITY) : f;
}
template <class A, class B>
auto min(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
auto max(A a, B b) {
  return a < b ? b : a;
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  emulated::run(*config, kernel, arguments...);
  return cudaSuccess;
}
