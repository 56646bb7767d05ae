// 64 bytes of features at a time on every instruction set, so that sums have one order everywhere.
#pragma once

#include <stdint.h>

#include "../../random.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vqk {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kParts = 64 / kBytes;

typedef float floats __attribute__((vector_size(kBytes), may_alias));
typedef double doubles __attribute__((vector_size(kBytes), may_alias));
typedef floats loose_floats __attribute__((aligned(4)));
typedef doubles loose_doubles __attribute__((aligned(8)));

// as many floats as there are doubles in a vector
typedef float few_floats __attribute__((vector_size(kBytes / 2), may_alias));
typedef few_floats loose_few_floats __attribute__((aligned(4)));
typedef double two_doubles __attribute__((vector_size(16), may_alias));

constexpr int64_t kDoubles = kBytes / 8;

VQK_INLINE doubles widened(few_floats v) {
#if defined(__AVX512F__)
  // gcc 12 makes two halves of the plain conversion
  return (doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)v);
#else
  return __builtin_convertvector(v, doubles);
#endif
}
VQK_INLINE doubles widened(const float* p) { return widened((few_floats) * (const loose_few_floats*)p); }
VQK_INLINE doubles widened(const double* p) { return *(const loose_doubles*)p; }

template <class T>
struct Vector;
template <>
struct Vector<float> {
  using type = floats;
  using loose = loose_floats;
};
template <>
struct Vector<double> {
  using type = doubles;
  using loose = loose_doubles;
};

template <class T>
constexpr int64_t kUnit = 64 / (int64_t)sizeof(T);

template <class T>
struct Unit {
  typename Vector<T>::type part[kParts];
};

template <class T>
VQK_INLINE Unit<T> fetch(const T* p) {
  Unit<T> u;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) u.part[i] = ((const typename Vector<T>::loose*)p)[i];
  return u;
}

template <class T>
VQK_INLINE void put(const Unit<T>& u, T* p) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) ((typename Vector<T>::loose*)p)[i] = u.part[i];
}

template <class T>
VQK_INLINE Unit<T> all(T v) {
  Unit<T> u;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) u.part[i] = typename Vector<T>::type{} + v;
  return u;
}

template <class T>
VQK_INLINE Unit<T> operator+(Unit<T> a, const Unit<T>& b) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) a.part[i] += b.part[i];
  return a;
}

template <class T>
VQK_INLINE Unit<T> operator-(Unit<T> a, const Unit<T>& b) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) a.part[i] -= b.part[i];
  return a;
}

template <class T>
VQK_INLINE Unit<T> operator*(Unit<T> a, const Unit<T>& b) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) a.part[i] *= b.part[i];
  return a;
}

// sums of a row in float64, from partial sums
VQK_INLINE void flush(const Unit<float>& u, Unit<double>& sums) {
  alignas(64) float v[16];
  put(u, v);
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const few_floats low = *(const loose_few_floats*)(v + i * kDoubles),
                     high = *(const loose_few_floats*)(v + 8 + i * kDoubles);
    sums.part[i] += widened(low + high);
  }
}
VQK_INLINE void flush(const Unit<double>& u, Unit<double>& sums) { sums = sums + u; }

VQK_INLINE double total(const double* v) {
  const two_doubles *const a = (const two_doubles*)v, s = (a[0] + a[2]) + (a[1] + a[3]);
  return s[0] + s[1];
}
VQK_INLINE double total(const Unit<double>& u) {
  alignas(64) double v[8];
  put(u, v);
  return total(v);
}

}  // namespace
}  // namespace vqk
