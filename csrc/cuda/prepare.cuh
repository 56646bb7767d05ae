// One pass over the codebook (two where a scale must be found first): half copies, half norms and what the
// certificate needs. One warp per code, one atomic per warp.
#pragma once

#include "rows.cuh"

namespace vqk::cuda {

struct Preparation {
  Points points;
  int64_t codes, features;
  Prepared out;
};

__device__ __forceinline__ unsigned long long bits_of_double(double v) {
  return (unsigned long long)__double_as_longlong(v);
}

// largest element and lowest index of the finite points
static __global__ void survey_kernel(Preparation a) {
  const int64_t step = (int64_t)gridDim.x * blockDim.y;
  double largest = 0;
  unsigned long long finite = 0;
  for (int64_t j = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; j < a.codes; j += step) {
    const Point point(a.points, j);
    double here = 0;
    bool good = true;
    for (int64_t k = threadIdx.x; k < a.features; k += 32) {
      const double v = point.at(a.points, k);
      good &= isfinite(v);
      here = fmax(here, fabs(v));
    }
    if (!__all_sync(kAll, good)) continue;
    largest = fmax(largest, here);
    if (finite == 0) finite = ~(unsigned long long)j;
  }
  for (int m = 16; m > 0; m /= 2) largest = fmax(largest, __shfl_xor_sync(kAll, largest, m));
  if (threadIdx.x != 0 || finite == 0) return;
  atomicMax(&a.out.spread->largest, bits_of_double(largest));
  atomicMax(&a.out.spread->finite, finite);
}

template <class H>
static __global__ void pack_kernel(Preparation a, bool scaled) {
  const int64_t step = (int64_t)gridDim.x * blockDim.y;
  const int64_t all = padded_codes(a.codes), width = padded_features(a.features);
  const double scale =
      scaled ? ldexp(1.0, scale_of(__longlong_as_double((long long)a.out.spread->largest))) : 1;
  double norm = 0, lost = 0;
  unsigned long long finite = 0;
  for (int64_t j = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; j < all; j += step) {
    H* const out = (H*)a.out.half + (j / kTile * kTile + place_of((int)(j % kTile))) * width;
    bool good = j < a.codes;
    const Point point(a.points, good ? j : 0);
    double square = 0, rest = 0;
    for (int64_t k = threadIdx.x; k < width; k += 32) {
      double v = good && k < a.features ? point.at(a.points, k) : 0;
      good &= isfinite(v);
      v *= scale;
      // by way of float32, and what that costs is measured with the rest
      const H h = half_of<H>((float)v);
      const double r = v - (double)float_from(h);
      square += v * v;
      rest += r * r;
      out[k] = half_of<H>(-float_from(h));
    }
    good = __all_sync(kAll, good);
    if (good) {
      square = warp_sum(square);
      rest = warp_sum(rest);
      norm = fmax(norm, square);
      lost = fmax(lost, rest);
      if (finite == 0) finite = ~(unsigned long long)j;
    } else {
      // a code that cannot win must not make a NaN of a score
      for (int64_t k = threadIdx.x; k < width; k += 32) out[k] = half_of<H>(0.0f);
    }
    if (threadIdx.x == 0) a.out.bias[j] = good ? (float)(0.5 * square) : INFINITY;
  }
  if (threadIdx.x != 0 || finite == 0) return;
  atomicMax(&a.out.spread->norm, bits_of_double(sqrt(norm) * kSlack));
  atomicMax(&a.out.spread->lost, bits_of_double(sqrt(lost) * kSlack));
  atomicMax(&a.out.spread->finite, finite);
}

}  // namespace vqk::cuda
