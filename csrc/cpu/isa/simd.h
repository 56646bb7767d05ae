// Vectors of the instruction set this file is compiled for.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace vqk {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
// searches hold two vectors of rows against a tile of codes
constexpr int kRows = 2 * kWidth;
// what a row remembers is spread over slots; tiles of codes take turns
constexpr int kSlots = 16;

constexpr double kInf = __builtin_inf();
// covers the rounding of sums of float64 squares and of the bounds themselves
constexpr double kSlack = 1 + 1e-8;

typedef float vfloat __attribute__((vector_size(4 * kWidth), may_alias));
typedef int32_t vint __attribute__((vector_size(4 * kWidth), may_alias));
// eight float64 on every instruction set, so that sums have one order everywhere
typedef double d8 __attribute__((vector_size(64), may_alias));
typedef float f8 __attribute__((vector_size(32), may_alias));
typedef int64_t i8 __attribute__((vector_size(64), may_alias));
typedef d8 d8u __attribute__((aligned(8)));
typedef f8 f8u __attribute__((aligned(4)));

static inline __attribute__((always_inline)) vfloat fused(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

static inline __attribute__((always_inline)) vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vfloat)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

static inline __attribute__((always_inline)) vfloat smaller_of(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vfloat)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

static inline __attribute__((always_inline)) double sum(d8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

static inline __attribute__((always_inline)) d8 load8(const double* p) { return *(const d8u*)p; }
static inline __attribute__((always_inline)) d8 load8(const float* p) {
  return __builtin_convertvector(*(const f8u*)p, d8);
}

static inline __attribute__((always_inline)) vint all(int32_t v) { return vint{} + v; }
static inline __attribute__((always_inline)) vfloat all(float v) { return v - vfloat{}; }

}  // namespace
}  // namespace vqk
