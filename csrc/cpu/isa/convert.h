// Rows in and out of buffers of float or double. Static throughout: each instruction set has its own copy.
#pragma once

#include "../../random.h"
#include "../rows.h"

namespace vqk {
namespace {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

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

template <class A>
void load(const Rows& rows, int64_t begin, int64_t n, A* out, int64_t ld) {
  switch (rows.type) {
    case Type::f16:
      return each<const F16>(rows, begin, n, ld, [out](const F16* v, int64_t at) { out[at] = (A)widen(*v); });
    case Type::bf16:
      return each<const BF16>(rows, begin, n, ld,
                              [out](const BF16* v, int64_t at) { out[at] = (A)widen(*v); });
    case Type::f32:
      return each<const float>(rows, begin, n, ld, [out](const float* v, int64_t at) { out[at] = (A)*v; });
    case Type::f64:
      return each<const double>(rows, begin, n, ld, [out](const double* v, int64_t at) { out[at] = (A)*v; });
  }
}

template <class A>
void store(const A* in, int64_t ld, const Rows& rows, int64_t begin, int64_t n) {
  switch (rows.type) {
    case Type::f16: return each<F16>(rows, begin, n, ld, [in](F16* v, int64_t at) { narrow(in[at], v); });
    case Type::bf16: return each<BF16>(rows, begin, n, ld, [in](BF16* v, int64_t at) { narrow(in[at], v); });
    case Type::f32: return each<float>(rows, begin, n, ld, [in](float* v, int64_t at) { narrow(in[at], v); });
    case Type::f64:
      return each<double>(rows, begin, n, ld, [in](double* v, int64_t at) { narrow(in[at], v); });
  }
}

// one NaN or Inf makes 0 * v a NaN, and NaN survives every sum
template <class A>
VQK_INLINE bool finite(const A* v, int64_t n) {
  int bad = 0;
  for (int64_t k = 0; k < n; ++k) bad |= !(__builtin_fabs((double)v[k]) <= 0x1.fffffffffffffp+1023);
  return !bad;
}

}  // namespace
}  // namespace vqk
