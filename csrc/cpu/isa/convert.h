// Rows in and out of buffers of float or double. Static throughout: each instruction set has its own copy.
#pragma once

#include "../../random.h"
#include "../rows.h"
#include "transpose.h"

namespace vqk {
namespace {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

template <class T, class U>
constexpr bool is_same = false;
template <class T>
constexpr bool is_same<T, T> = true;

VQK_INLINE float widen(F16 h) {
  const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  const float normal = float_of((magnitude << 13) + (112u << 23));
  const float small = (float)(int32_t)magnitude * 0x1p-24f;
  const uint32_t bits = magnitude >= 0x7c00  ? magnitude << 13 | 0x7f800000u
                        : magnitude < 0x0400 ? bits_of(small)
                                             : bits_of(normal);
  return float_of(bits | sign);
}
VQK_INLINE float widen(BF16 h) { return float_of((uint32_t)h.bits << 16); }
VQK_INLINE float widen(float v) { return v; }
VQK_INLINE double widen(double v) { return v; }

VQK_INLINE void narrow(float v, F16* out) {
  const uint32_t bits = bits_of(v), sign = bits & 0x80000000u, a = bits ^ sign;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
  // 0.5 has the spacing of the subnormal halves, so this sum rounds to nearest even
  const uint32_t small = bits_of(float_of(a) + 0.5f) - 0x3f000000u;
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = a >= 0x47800000u ? special : a < 0x38800000u ? small : normal;
  out->bits = (uint16_t)(half | sign >> 16);
}
VQK_INLINE void narrow(float v, BF16* out) {
  const uint32_t bits = bits_of(v);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out->bits = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
VQK_INLINE void narrow(float v, float* out) { *out = v; }
// by way of float32, as torch does
VQK_INLINE void narrow(double v, F16* out) { narrow((float)v, out); }
VQK_INLINE void narrow(double v, BF16* out) { narrow((float)v, out); }
VQK_INLINE void narrow(double v, float* out) { *out = (float)v; }
VQK_INLINE void narrow(double v, double* out) { *out = v; }
VQK_INLINE void narrow(float v, double* out) { *out = v; }

VQK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VQK_INLINE int64_t magnitude(int64_t a) { return a < 0 ? -a : a; }

// visits rows [begin, begin + n) of `rows` against a buffer whose row r starts at ld * r, along the shorter
// stride
template <class T, class Visit>
VQK_INLINE void each(const Rows& rows, int64_t begin, int64_t n, int64_t ld, Visit visit) {
  const int64_t d = rows.features, sd = rows.stride_feature, sm = rows.stride_inner;
  for (int64_t r = 0; r < n;) {
    const int64_t b = (begin + r) / rows.inner, m = (begin + r) % rows.inner,
                  run = smaller(n - r, rows.inner - m);
    T* const from = (T*)rows.data + b * rows.stride_batch + m * sm;
    if (run == 1 || magnitude(sd) <= magnitude(sm)) {
      for (int64_t q = 0; q < run; ++q) {
        if (sd == 1)
          for (int64_t k = 0; k < d; ++k) visit(from + q * sm + k, (r + q) * ld + k);
        else
          for (int64_t k = 0; k < d; ++k) visit(from + q * sm + k * sd, (r + q) * ld + k);
      }
    } else {
      for (int64_t k = 0; k < d; ++k)
        for (int64_t q = 0; q < run; ++q) visit(from + q * sm + k * sd, (r + q) * ld + k);
    }
    r += run;
  }
}

// float32 and halves, a run of neighbours at a time
template <class T>
VQK_INLINE void widen_run(const T* from, int64_t n, float* out) {
  int64_t k = 0;
#if defined(__AVX512F__)
  if constexpr (is_same<T, F16>)
    for (; k + 16 <= n; k += 16)
      _mm512_storeu_ps(out + k,
                       _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)(from + k))));
#endif
  for (; k < n; ++k) out[k] = widen(from[k]);
}

template <class T>
VQK_INLINE void narrow_run(const float* in, int64_t n, T* to) {
  int64_t k = 0;
#if defined(__AVX512F__)
  if constexpr (is_same<T, F16>)
    for (; k + 16 <= n; k += 16)
      _mm256_storeu_si256((__m256i*)(to + k), _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(in + k), 0));
#endif
  for (; k < n; ++k) narrow(in[k], to + k);
}

// visits rows that lie across, such as those of NCHW: a run of them within one batch at a time
template <class T, class Visit>
VQK_INLINE void across(const Rows& rows, int64_t begin, int64_t n, Visit visit) {
  for (int64_t r = 0; r < n;) {
    const int64_t b = (begin + r) / rows.inner, m = (begin + r) % rows.inner,
                  run = smaller(n - r, rows.inner - m);
    visit((T*)rows.data + b * rows.stride_batch + m, r, run);
    r += run;
  }
}

VQK_INLINE bool lies_across(const Rows& rows) {
  return rows.type != Type::f64 && rows.stride_inner == 1 && rows.stride_feature != 1;
}

// halves are turned as float32, kSquare features of kTurnRun rows at a time
constexpr int64_t kTurnRun = 64;

template <class T>
void load_across(const Rows& rows, int64_t begin, int64_t n, float* out, int64_t ld) {
  const int64_t d = rows.features, sd = rows.stride_feature;
  across<const T>(rows, begin, n, [&](const T* from, int64_t r, int64_t run) {
    if constexpr (is_same<T, float>) {
      turn(from, sd, d, run, out + r * ld, ld);
    } else {
      alignas(64) float some[kSquare * kTurnRun];
      for (int64_t q = 0; q < run; q += kTurnRun)
        for (int64_t k = 0; k < d; k += kSquare) {
          const int64_t length = smaller(kTurnRun, run - q), features = smaller(kSquare, d - k);
          for (int64_t f = 0; f < features; ++f)
            widen_run(from + (k + f) * sd + q, length, some + f * kTurnRun);
          turn(some, kTurnRun, features, length, out + (r + q) * ld + k, ld);
        }
    }
  });
}

template <class T>
void store_across(const float* in, int64_t ld, const Rows& rows, int64_t begin, int64_t n) {
  const int64_t d = rows.features, sd = rows.stride_feature;
  across<T>(rows, begin, n, [&](T* to, int64_t r, int64_t run) {
    if constexpr (is_same<T, float>) {
      turn(in + r * ld, ld, run, d, to, sd);
    } else {
      alignas(64) float some[kSquare * kTurnRun];
      for (int64_t q = 0; q < run; q += kTurnRun)
        for (int64_t k = 0; k < d; k += kSquare) {
          const int64_t length = smaller(kTurnRun, run - q), features = smaller(kSquare, d - k);
          turn(in + (r + q) * ld + k, ld, length, features, some, kTurnRun);
          for (int64_t f = 0; f < features; ++f)
            narrow_run(some + f * kTurnRun, length, to + (k + f) * sd + q);
        }
    }
  });
}

// rows to or from float32
template <class T>
void load_floats(const Rows& rows, int64_t begin, int64_t n, float* out, int64_t ld) {
  if (n > 1 && lies_across(rows)) return load_across<T>(rows, begin, n, out, ld);
  if (rows.stride_feature != 1)
    return each<const T>(rows, begin, n, ld, [out](const T* v, int64_t at) { out[at] = widen(*v); });
  Rows whole = rows;
  whole.features = 1;
  each<const T>(whole, begin, n, 1,
                [&](const T* v, int64_t at) { widen_run(v, rows.features, out + at * ld); });
}

template <class T>
void store_floats(const float* in, int64_t ld, const Rows& rows, int64_t begin, int64_t n) {
  if (n > 1 && lies_across(rows)) return store_across<T>(in, ld, rows, begin, n);
  if (rows.stride_feature != 1)
    return each<T>(rows, begin, n, ld, [in](T* v, int64_t at) { narrow(in[at], v); });
  Rows whole = rows;
  whole.features = 1;
  each<T>(whole, begin, n, 1, [&](T* v, int64_t at) { narrow_run(in + at * ld, rows.features, v); });
}

template <class T, class A>
void load_as(const Rows& rows, int64_t begin, int64_t n, A* out, int64_t ld) {
  if constexpr (is_same<A, float> && !is_same<T, double>)
    load_floats<T>(rows, begin, n, out, ld);
  else
    each<const T>(rows, begin, n, ld, [out](const T* v, int64_t at) { out[at] = (A)widen(*v); });
}

template <class T, class A>
void store_as(const A* in, int64_t ld, const Rows& rows, int64_t begin, int64_t n) {
  if constexpr (is_same<A, float> && !is_same<T, double>)
    store_floats<T>(in, ld, rows, begin, n);
  else
    each<T>(rows, begin, n, ld, [in](T* v, int64_t at) { narrow(in[at], v); });
}

template <class A>
void load(const Rows& rows, int64_t begin, int64_t n, A* out, int64_t ld) {
  switch (rows.type) {
    case Type::f16: return load_as<F16>(rows, begin, n, out, ld);
    case Type::bf16: return load_as<BF16>(rows, begin, n, out, ld);
    case Type::f32: return load_as<float>(rows, begin, n, out, ld);
    case Type::f64: return load_as<double>(rows, begin, n, out, ld);
  }
}

template <class A>
void store(const A* in, int64_t ld, const Rows& rows, int64_t begin, int64_t n) {
  switch (rows.type) {
    case Type::f16: return store_as<F16>(in, ld, rows, begin, n);
    case Type::bf16: return store_as<BF16>(in, ld, rows, begin, n);
    case Type::f32: return store_as<float>(in, ld, rows, begin, n);
    case Type::f64: return store_as<double>(in, ld, rows, begin, n);
  }
}

// one NaN or Inf fails its comparison
VQK_INLINE bool finite(const double* v, int64_t n) {
  int bad = 0;
  for (int64_t k = 0; k < n; ++k) bad |= !(__builtin_fabs(v[k]) <= 0x1.fffffffffffffp+1023);
  return !bad;
}
VQK_INLINE bool finite(const float* v, int64_t n) {
  int bad = 0;
  for (int64_t k = 0; k < n; ++k) bad |= !(__builtin_fabsf(v[k]) <= 0x1.fffffep+127f);
  return !bad;
}

}  // namespace
}  // namespace vqk
