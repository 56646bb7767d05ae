// A tile of rows in shared memory, as both searches multiply it, and the fixed point of its scores.
//
// Chunks of 64 features follow one another; within a chunk a row is 128 bytes, and its sixteen-byte piece p
// stands at place p ^ (row & 7): the 128-byte swizzle of TMA and wgmma, free of bank conflicts for ldmatrix.
#pragma once

#include "rows.cuh"

namespace vqk::cuda {

struct Search {
  Rows x;
  bool vector, scaled;
  Points points;
  Prepared prepared;
  int64_t count, features;
  int tiles, steps, splits;  // tiles of codes, mma steps of features
  uint4* results;  // (splits, N): best, second, code, step of the fixed point (0: not to be trusted)
};

// at most 64 splits of at most 2^24 tiles
__device__ __forceinline__ int first_tile(const Search& s, int split) {
  return (int)((uint32_t)s.tiles * (uint32_t)split / (uint32_t)s.splits);
}

// the open rows whose candidates are looked for
struct Open {
  unsigned int* count;
  unsigned int capacity;
  uint32_t* rows;       // (capacity)
  float* bars;          // (capacity): what a candidate's score may be
  unsigned int* found;  // (capacity)
  uint32_t* codes;      // (capacity, kCandidates)
};

__device__ __forceinline__ int piece_at(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

template <class H>
__device__ __forceinline__ uint32_t pack2(H a, H b) {
  uint16_t low, high;
  memcpy(&low, &a, 2);
  memcpy(&high, &b, 2);
  return (uint32_t)high << 16 | low;
}

// one warp fills rows first .. first + kRows - 1 of a tile: `row_of(i)` is the row of tile row i, or
// negative. factor[i] undoes the row's scale, in the codebook's units; 0: float32 cannot hold the row's
// scores, and `largest` (bits of a float) does not see it
template <class H, int kRows, class RowOf>
__device__ __forceinline__ void fill(const Search& s, const Reach& reach, int first, char* tile,
                                     int chunk_bytes, float* factor, int* largest, RowOf row_of) {
  const int lane = threadIdx.x & 31, pieces = s.steps * 2;
  // contiguous features: eight lanes along a row; else lanes along the rows, as in NCHW
  const bool along = s.x.stride_feature == 1;
  const int rows = along ? kRows / 4 : 1, begin = along ? lane & 7 : lane / kRows,
            step = along ? 8 : 32 / kRows;
  const float half = (float)(reach.norm + reach.lost) * 1.01f;
  for (int i = 0; i < rows; ++i) {
    const int local = first + (along ? 4 * i + (lane >> 3) : lane % kRows);
    const int64_t row = row_of(local), from = row >= 0 ? offset(s.x, row) : 0;
    int shift = reach.exponent;
    if (s.scaled) {
      float top = 0;
      for (int p = begin; p < pieces && row >= 0; p += step) {
        float v[8];
        load8(s.x, s.vector, from, 8 * p, v);
#pragma unroll
        for (int q = 0; q < 8; ++q) top = fmaxf(top, fabsf(v[q]));
      }
      for (int m = along ? 1 : kRows; m < (along ? 8 : 32); m *= 2)
        top = fmaxf(top, __shfl_xor_sync(kAll, top, m));
      if (top > 0 && top < INFINITY) shift = scale_of(top);
    }
    // far beyond what a factor holds; such a row is left to float64
    const bool near = abs(reach.exponent - shift) <= 100;
    const Scale scale(s.scaled && near ? shift : 0);
    float square = 0;
    for (int p = begin; p < pieces; p += step) {
      float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      if (row >= 0) load8(s.x, s.vector, from, 8 * p, v);
      H h[8];
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        h[q] = half_of<H>(scale(v[q]));
        const float back = float_from(h[q]);
        square += back * back;
      }
      const uint4 packed = {pack2(h[0], h[1]), pack2(h[2], h[3]), pack2(h[4], h[5]), pack2(h[6], h[7])};
      *(uint4*)(tile + (p >> 3) * chunk_bytes + piece_at(local, p & 7)) = packed;
    }
    for (int m = along ? 1 : kRows; m < (along ? 8 : 32); m *= 2) square += __shfl_xor_sync(kAll, square, m);
    if (begin != 0) continue;
    const float undo = s.scaled && near ? ldexpf(1.0f, reach.exponent - shift) : 1.0f;
    const float products = sqrtf(square) * undo * half;
    const bool held = row >= 0 && near && products <= 0x1p100f && half <= 0x1p50f;
    factor[local] = held ? undo : 0.0f;
    if (held) atomicMax(largest, __float_as_int(products));
  }
}

// what is added to a half norm to bring a tile's scores into fixed point
__device__ __forceinline__ float offset_of(int largest, const Reach& reach) {
  const float products = __int_as_float(largest), norm = (float)reach.norm;
  // rows and codes beyond it are not held
  const float range = fminf(fmaxf((2 * products + 0.5f * norm * norm) * 1.01f, 0x1p-110f), 0x1p110f);
  return ldexpf(1.0f, exponent_of(ilogbf(range))) + products;
}

// one unit of the fixed point; the offset has its exponent, as every score has
__device__ __forceinline__ float step_of(float offset) { return ldexpf(1.0f, ilogbf(offset) - 23); }

}  // namespace vqk::cuda
