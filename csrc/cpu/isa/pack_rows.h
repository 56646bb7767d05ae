// Rows as integers, one to a lane, two features to a lane's halves; and what that costs in accuracy.
#pragma once

#include "bounds.h"

namespace vqk {
namespace {

VQK_INLINE vfloat as_float(vfloat v) { return v; }
VQK_INLINE vfloat as_float(vdouble v) { return __builtin_convertvector(v, vfloat); }
VQK_INLINE vfloat widened(vfloat v, const vfloat*) { return v; }
VQK_INLINE vdouble widened(vfloat v, const vdouble*) { return __builtin_convertvector(v, vdouble); }

// kWidth features from k0 on of kWidth rows, one row to a lane
template <class V>
VQK_INLINE void fetch(const float* raw, int64_t ld, int64_t k0, V* out) {
  vfloat a[kWidth];
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) a[l] = *(const vfloat*)(raw + l * ld + k0);
  transpose(a);
#pragma GCC unroll 16
  for (int l = 0; l < kWidth; ++l) out[l] = widened(a[l], (V*)nullptr);
}
VQK_INLINE void fetch(const double* raw, int64_t ld, int64_t k0, vdouble* out) {
  for (int l = 0; l < kWidth; ++l)
    for (int q = 0; q < kWidth; ++q) out[q][l] = raw[l * ld + k0 + q];
}

// kWidth rows of `raw` (row-major, zeros up to ld) to every second vector of `out`
template <class V, class X>
void pack_rows(const Codes& codes, const Bounds& b, const X* raw, int64_t ld, V* lanes, vint* out,
               vint* shifts, vint* margins, vfloat* lengths) {
  constexpr bool wide = sizeof(V) > sizeof(vfloat);
  const int64_t d = codes.features;
  V norm = {}, element = {};
  for (int64_t k0 = 0; k0 < ld; k0 += kWidth) {
    V v[kWidth];
    fetch(raw, ld, k0, v);
    const int64_t n = smaller(kWidth, d - k0);
    for (int64_t q = 0; q < n; ++q) {
      if constexpr (wide)
        v[q] = (v[q] - codes.centre[k0 + q]) * codes.row_scale;
      else
        v[q] = v[q] * (float)codes.row_scale;
      lanes[k0 + q] = v[q];
      norm += v[q] * v[q];
      const V size = v[q] < 0 ? -v[q] : v[q];
      element = size > element ? size : element;
    }
  }
  const vfloat length = root(as_float(norm));
  const vint t = shifts_of(b, length * b.sum, as_float(element) * (1 + 0x1p-20f));
  const vint open = t > kShifts;
  const vfloat down = open ? vfloat{} : (vfloat)((127 - t) << 23);
  const V factor = widened(down, (V*)nullptr);
  // adding it rounds to an integer, ties to even, and leaves the integer in the lowest bits
  constexpr float kRoundF = 0x1.8p23f;
  V rest = {};
  for (int64_t k = 0; k < d; k += 2) {
    const V w0 = lanes[k] * factor, w1 = k + 1 < d ? lanes[k + 1] * factor : V{};
    const vfloat s0 = as_float(w0) + kRoundF, s1 = as_float(w1) + kRoundF;
    const V e0 = w0 - widened(s0 - kRoundF, (V*)nullptr), e1 = w1 - widened(s1 - kRoundF, (V*)nullptr);
    rest += e0 * e0;
    rest += e1 * e1;
    out[k] = mixed((vint)s0, all(0xffff), (vint)s1 << 16);
  }
  *shifts = t;
  // squares below the range of float32 vanish
  *lengths = length * b.sum * (1 + 0x1p-16f) + root(all((float)d)) * 0x1p-62f;
  *margins = margins_of(b, t, length, as_float(rest));
}

}  // namespace
}  // namespace vqk
