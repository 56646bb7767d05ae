// The contract to the letter for whole rows: float64 inputs, and what the certificate and its candidates
// left. Each item is eight rows against a share of the codes, one code per thread at a time.
#pragma once

#include "rows.cuh"

namespace vqk::cuda {

constexpr int kBruteThreads = 256, kBruteChunk = 64;

struct Part {
  double distance;
  int64_t code;
};

struct Brute {
  Rows x;
  Points points;
  int64_t codes;
  const Spread* spread;
  const uint32_t* rows;       // null: all of them
  const unsigned int* count;  // null: `all`
  int64_t all;
  Part* parts;         // (kBruteBlocks, kBruteRows)
  unsigned int* done;  // (kBruteBlocks), 0
  Answers answers;
};

__device__ __forceinline__ void improve(Part& a, double distance, int64_t code) {
  if (distance < a.distance || (distance == a.distance && code < a.code)) a = {distance, code};
}

static __global__ void __launch_bounds__(kBruteThreads) brute_kernel(const __grid_constant__ Brute b) {
  __shared__ double xs[kBruteRows][kBruteChunk];
  __shared__ int64_t from[kBruteRows];
  __shared__ Part parts[kBruteThreads / 32][kBruteRows];
  __shared__ int bad[kBruteRows];
  __shared__ bool last;
  const int thread = threadIdx.x;
  const int64_t count = b.count ? (int64_t)*b.count : b.all, d = b.x.features;
  const int64_t groups = (count + kBruteRows - 1) / kBruteRows,
                turns = (b.codes + kBruteThreads - 1) / kBruteThreads;
  if (groups == 0) return;
  // few rows: the blocks share the codes
  const int64_t shares = gridDim.x / groups, splits = shares < 1 ? 1 : shares < turns ? shares : turns;
  const unsigned long long finite = b.spread->finite;
  for (int64_t item = blockIdx.x; item < groups * splits; item += gridDim.x) {
    const int64_t group = item / splits, split = item % splits;
    const auto row_of = [&](int r) {
      const int64_t slot = group * kBruteRows + r;
      return slot >= count ? (int64_t)-1 : b.rows ? (int64_t)b.rows[slot] : slot;
    };
    __syncthreads();
    if (thread < kBruteRows) {
      from[thread] = row_of(thread) >= 0 ? offset(b.x, row_of(thread)) : -1;
      bad[thread] = 0;
    }
    Part best[kBruteRows];
    // where every distance overflows, the lowest finite code has the least of them
#pragma unroll
    for (int r = 0; r < kBruteRows; ++r) best[r] = {INFINITY, (int64_t)~finite};
    for (int64_t turn = turns * split / splits; turn < turns * (split + 1) / splits; ++turn) {
      const int64_t j = turn * kBruteThreads + thread;
      const Point point(b.points, j < b.codes ? j : 0);
      double total[kBruteRows] = {};
      for (int64_t k0 = 0; k0 < d; k0 += kBruteChunk) {
        __syncthreads();
#pragma unroll
        for (int at = thread; at < kBruteRows * kBruteChunk; at += kBruteThreads) {
          const int r = at / kBruteChunk, k = at % kBruteChunk;
          const bool inside = k0 + k < d && from[r] >= 0;
          const double v = inside ? read<double>(b.x, from[r] + (k0 + k) * b.x.stride_feature) : 0;
          xs[r][k] = v;
          if (!isfinite(v)) bad[r] = 1;
        }
        __syncthreads();
        const int steps = d - k0 < kBruteChunk ? (int)(d - k0) : kBruteChunk;
        for (int k = 0; k < steps; ++k) {
          const double p = point.at(b.points, k0 + k);
#pragma unroll
          for (int r = 0; r < kBruteRows; ++r) total[r] = add_square(total[r], xs[r][k], p);
        }
      }
      // a code that is not finite gives inf or NaN, and neither is less
      if (j < b.codes)
#pragma unroll
        for (int r = 0; r < kBruteRows; ++r)
          if (total[r] < best[r].distance) best[r] = {total[r], j};
    }
#pragma unroll
    for (int r = 0; r < kBruteRows; ++r) {
#pragma unroll
      for (int m = 16; m > 0; m /= 2) {
        const double distance = __shfl_xor_sync(kAll, best[r].distance, m);
        const int64_t code = __shfl_xor_sync(kAll, best[r].code, m);
        improve(best[r], distance, code);
      }
      if (thread % 32 == 0) parts[thread / 32][r] = best[r];
    }
    __syncthreads();
    const int64_t row = thread < kBruteRows ? row_of(thread) : -1;
    Part all = {INFINITY, INT64_MAX};
    if (row >= 0) {
      for (int w = 0; w < kBruteThreads / 32; ++w)
        improve(all, parts[w][thread].distance, parts[w][thread].code);
      if (finite == 0 || bad[thread]) all = {nan(""), 0};
    }
    if (splits > 1) {
      // the block that ends last answers for the group
      if (thread < kBruteRows) {
        b.parts[item * kBruteRows + thread] = all;
        __threadfence();
      }
      __syncthreads();
      if (thread == 0) last = atomicAdd(b.done + group, 1u) == (unsigned int)splits - 1;
      __syncthreads();
      if (!last) continue;
      __threadfence();
      if (row >= 0 && !isnan(all.distance)) {
        all = {INFINITY, INT64_MAX};
        for (int64_t i = 0; i < splits; ++i) {
          const volatile Part* const part = b.parts + (group * splits + i) * kBruteRows + thread;
          improve(all, part->distance, part->code);
        }
      }
    }
    if (row >= 0) b.answers.put(row, all.code, all.distance);
  }
}

}  // namespace vqk::cuda
