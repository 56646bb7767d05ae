// Vectors of int32 and float32 with one row per lane, and the integer dot products of the search.
#pragma once

#include "convert.h"
#include "simd.h"

namespace vqk {
namespace {

// a tile: this many codes against two vectors of rows, in registers; codes in groups whose maximum is kept
#if defined(__AVX512F__)
constexpr int kCodes = 12, kGroup = 4;
#elif defined(__AVX2__)
constexpr int kCodes = 6, kGroup = 3;
#else
constexpr int kCodes = 4, kGroup = 4;
#endif
constexpr int kGroups = kCodes / kGroup;

typedef vint vintu __attribute__((aligned(4)));
typedef double vdouble __attribute__((vector_size(8 * kWidth), may_alias));

// acc + lo(a) lo(b) + hi(a) hi(b), halves of each lane as int16
VQK_INLINE vint dot(vint acc, vint a, vint b) {
#if defined(__AVX512VNNI__)
  return (vint)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
  return acc + (vint)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return acc + (vint)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return acc + (vint)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return acc + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

VQK_INLINE vint larger(vint a, vint b) {
#if defined(__AVX512F__)
  return (vint)_mm512_maskz_max_epi32(0xffff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vint)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

VQK_INLINE vint smaller_of(vint a, vint b) {
#if defined(__AVX512F__)
  return (vint)_mm512_maskz_min_epi32(0xffff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vint)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
  return a < b ? a : b;
#endif
}

// the bits of `keep` from a, the others from b, whose kept bits are 0
VQK_INLINE vint mixed(vint a, vint keep, vint b) {
#if defined(__AVX512F__)
  return (vint)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)keep, (__m512i)b, 0xea);
#else
  return (a & keep) | b;
#endif
}

// bit l: lane l of a is at least that of b
VQK_INLINE uint32_t at_least(vint a, vint b) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return 0xffu & ~(uint32_t)_mm256_movemask_ps((__m256)_mm256_cmpgt_epi32((__m256i)b, (__m256i)a));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kWidth; ++lane) bits |= (uint32_t)(a[lane] >= b[lane]) << lane;
  return bits;
#endif
}

VQK_INLINE vfloat root(vfloat v) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (vfloat)_mm_sqrt_ps((__m128)v);
#else
  for (int lane = 0; lane < kWidth; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
#endif
}

// kWidth rows of kWidth floats, transposed in place: log2 rounds of perfect shuffles
VQK_INLINE void transpose(vfloat* a) {
  vint low, high;
  for (int lane = 0; lane < kWidth; ++lane) {
    low[lane] = lane / 2 + (lane % 2) * kWidth;
    high[lane] = low[lane] + kWidth / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kWidth; round *= 2) {
    vfloat b[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + kWidth / 2], low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + kWidth / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) a[i] = b[i];
  }
}

}  // namespace
}  // namespace vqk
