// What both searches do with the products of a tile: lane q of four holds, of rows g and g + 8 (g = lane /
// 4), the kCount codes that stand next to one another from `first` on (plan.h, place_of).
#pragma once

#include "fill.cuh"
#include "top.h"

namespace vqk::cuda {

// products[4 i + 2 r + b] of row r and code first + 2 i + b become scores; `bias` points to the codes' half
// norms
template <int kCount>
__device__ __forceinline__ void fold(float (&products)[2 * kCount], const float* bias, float offset,
                                     const float (&factor)[2], Top (&top)[2], uint32_t first,
                                     uint32_t shift) {
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    const float4 b = __ldg((const float4*)(bias + j));
    const float half[4] = {b.x + offset, b.y + offset, b.z + offset, b.w + offset};
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& p = products[4 * ((j + q) / 2) + 2 * r + (q & 1)];
        p = __fmaf_rn(p, factor[r], half[q]);
      }
  }
  const auto score = [&](int r) {
    return [&products, r](int j) { return __float_as_int(products[4 * (j / 2) + 2 * r + (j & 1)]); };
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = least<kCount, int>(score(r));
    // the code and the runner-up within a tile matter only where it improves a row, which becomes rare
    if (__any_sync(kAll, at < top[r].best))
      improve<kCount>(top[r], at, first, shift, score(r));
    else
      top[r].second = lesser(top[r].second, at);
  }
}

// over the four lanes of a row
__device__ __forceinline__ void merge_lanes(Top& top) {
#pragma unroll
  for (int m = 1; m <= 2; m *= 2) {
    Top other;
    other.best = __shfl_xor_sync(kAll, top.best, m);
    other.second = __shfl_xor_sync(kAll, top.second, m);
    other.code = __shfl_xor_sync(kAll, top.code, m);
    merge(top, other);
  }
}

__device__ __forceinline__ uint4 result_of(const Top& top, float step) {
  return {(uint32_t)top.best, (uint32_t)top.second, top.code, __float_as_uint(step)};
}

}  // namespace vqk::cuda
