// Elements of strided rows of any of the four dtypes, and sums over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../random.h"
#include "kernels.h"

namespace vqk::cuda {

__device__ __forceinline__ int64_t offset(const Rows& rows, int64_t n) {
  // (N, D) rows need no division of 64 bits
  if (rows.batch == 1) return n * rows.stride_inner;
  return n / rows.inner * rows.stride_batch + n % rows.inner * rows.stride_inner;
}

template <class A>
__device__ __forceinline__ A read(const Rows& rows, int64_t at) {
  switch (rows.type) {
    case Type::f16: return (A)__half2float(((const __half*)rows.data)[at]);
    case Type::bf16: return (A)__bfloat162float(((const __nv_bfloat16*)rows.data)[at]);
    case Type::f32: return (A)((const float*)rows.data)[at];
    default: return (A)((const double*)rows.data)[at];
  }
}

template <class A>
__device__ __forceinline__ void write(const Rows& rows, int64_t at, A value) {
  switch (rows.type) {
    // float64 reaches the halves by way of float32, as in torch
    case Type::f16: ((__half*)rows.data)[at] = __float2half_rn((float)value); break;
    case Type::bf16: ((__nv_bfloat16*)rows.data)[at] = __float2bfloat16_rn((float)value); break;
    case Type::f32: ((float*)rows.data)[at] = (float)value; break;
    default: ((double*)rows.data)[at] = (double)value; break;
  }
}

__device__ __forceinline__ double warp_sum(double v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// blocks that cover `count` with `each` apiece, within what a grid can hold; kernels stride over the rest
inline unsigned int grid_of(int64_t count, int64_t each) {
  const int64_t blocks = (count + each - 1) / each;
  return (unsigned int)(blocks < 1 ? 1 : blocks > 0x7fffffff ? 0x7fffffff : blocks);
}

}  // namespace vqk::cuda
