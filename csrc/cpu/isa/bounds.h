// The certificate of the search. Everything in isa/ that scales, rounds or compares serves one inequality.
//
// With mu the centre, x' = x - mu, c' = c - mu, the index wanted minimises |x' - c'|^2, that is, it maximises
// x'.c'_j - |c'_j|^2 / 2. Rows and codes become integers: k_j = rint(S c'_j) with one scale S for all codes,
// h = rint(w) with w = P 2^-t x', P for all rows and t >= 0 for each, |h_d|, |k_d| < 2^15. In units of 2^t /
// (P S), with q_j = S c'_j and T_j = w.q_j - 2^-t (P / S) |q_j|^2 / 2, the search computes
//
//   s_j = h.k_j + floor(-b_j 2^-t),  b_j = rint((P / S) |q_j|^2 / 2),     every step exact in int32, and
//   |s_j - T_j| <= E = |w - h| max|k| + |w| max|q - k| + 3                (Cauchy-Schwarz, and two roundings)
//
// int32 holds it because t is chosen so that |h| max|k| + max b 2^-t <= L < 2^31. The residuals |w - h|, |q -
// k| are measured, not estimated. The contract's own distance d is a sum of D rounded squares of rounded
// differences, within (D + 3) 2^-53 d + D 2^-1075 of the real one, and d <= (|x'| + C)^2 for every code, C =
// max|c'|: half of twice that, in units, is F = (D + 4) 2^-52 (|w| + P 2^-t C)^2 2^t S / P + (D + 2) 2^-1074
// P S. So a code with s < max s - 2 (E + F) cannot win. A key is s with its lowest bits replaced by a name:
// what is compared is rounded down to these bits on both sides, which loses no code. Rows for which any of
// this leaves its range stay open.
#pragma once

#include "../kernels.h"
#include "lanes.h"

namespace vqk {
namespace {

// L, below INT32_MAX by more than twice the largest margin
constexpr double kRange = 0x1p31 * (1 - 0x1p-5);
constexpr int32_t kWidest = 1 << 24;
constexpr int kShifts = 40;
// |S c'| of the longest code: with rows as long as codes both residuals weigh the same
constexpr double kCodeNorm = 37000, kElement = 32766;

VQK_INLINE double ceiling_of_norm(const Codes& codes) {
  return codes.reach * codes.scale * kSlack + 0.5 * __builtin_sqrt((double)codes.features);
}
VQK_INLINE double room(const Codes& codes) {
  return kRange - 0.5 * __builtin_sqrt((double)codes.features) * ceiling_of_norm(codes) - 64;
}
VQK_INLINE double half_square(const Codes& codes) {
  const double norm = codes.reach * codes.scale;
  return 0.5 * norm * norm * kSlack + 1;
}

// S and P
void scale(Codes* codes, double largest) {
  codes->scale = codes->row_scale = 1;
  if (!(codes->reach > 0)) return;
  // beyond this every row goes to float64; packed codes must only be numbers
  if (!(codes->reach < 0x1p1000)) {
    codes->scale = codes->row_scale = 0x1p-1020;
    return;
  }
  const double by_norm = kCodeNorm / codes->reach, by_element = kElement / largest;
  codes->scale = by_norm < by_element ? by_norm : by_element;
  // beyond these powers float64 itself leaves its normal range
  if (!(codes->scale < 0x1p1000)) codes->scale = 0x1p1000;
  // t = 0 serves rows up to an eighth of the longest code
  const double unit = ceiling_of_norm(*codes) * (codes->reach / 8) + half_square(*codes) / codes->scale;
  codes->row_scale = room(*codes) / unit;
  if (!(codes->row_scale < 0x1p1000)) codes->row_scale = 0x1p1000;
}

// what the margin of a row is made of, rounded up to float32
struct Bounds {
  float norm_need, base_need, element_need;  // of t, from |P x'| and its largest element
  float longest;                             // |P x'| beyond which distances may overflow
  float packed_norm, residual;               // max|k|, max|q - k|
  float reach, literal, tiny;                // P C, and what F takes from each
  float sum, product;                        // relative errors of |w - h| and w as computed
  int32_t keep;                              // bits of a score that a key keeps
};

VQK_INLINE float up(double v) { return (float)(v * (1 + 0x1p-20)); }

Bounds bounds_of(const Codes& codes, bool wide) {
  const double d = (double)codes.features, p = codes.row_scale, s = codes.scale, space = room(codes);
  const int64_t tiles = (codes.count + kCodes - 1) / kCodes, names = ((tiles - 1) / kSlots + 1) * kGroups;
  Bounds b;
  b.norm_need = up(ceiling_of_norm(codes) / space);
  b.base_need = up((half_square(codes) * (p / s) + 1) / space);
  b.element_need = up(1 / kElement);
  const double longest = (0x1p511 - codes.reach) * p;
  b.longest = longest < 0x1p100 ? (float)(longest * (1 - 0x1p-20)) : 0x1p100f;
  b.packed_norm = up(codes.packed_norm);
  b.residual = up(codes.residual);
  b.reach = up(codes.reach * p);
  b.literal = up((d + 4) * 0x1p-51 * (s / p));
  b.tiny = up((d + 2) * 0x1p-1073 * p * s);
  b.sum = up(1 + (d + 16) * (wide ? 0x1p-52 : 0x1p-23));
  b.product = wide ? 0x1p-50f : 0x1p-22f;
  int32_t step = 1;
  while (step < names) step *= 2;
  b.keep = -step;
  // beyond these sizes every row goes to float64
  if (!(space > 0x1p30) || step > 1 << 22 || !(codes.reach < 0x1p1000)) b.longest = -1;
  return b;
}

// t of each row, and the mask of rows that have one
VQK_INLINE vint shifts_of(const Bounds& b, vfloat norm, vfloat element) {
  const vfloat by_norm = norm * b.norm_need + b.base_need, by_element = element * b.element_need;
  // a NaN or Inf has the largest exponent
  const vint power = ((vint)by_norm >> 23) - 126, other = ((vint)by_element >> 23) - 126;
  const vint t = larger(larger(power, other), vint{});
  return norm <= b.longest ? t : all(INT32_MAX);
}

// 2 (E + F), in units; INT32_MAX: the row stays open
VQK_INLINE vint margins_of(const Bounds& b, vint shifts, vfloat norm, vfloat rest) {
  const vint open = shifts > kShifts;
  const vint t = open ? vint{} : shifts;
  const vfloat down = (vfloat)((127 - t) << 23), back = (vfloat)((127 + t) << 23);
  const vfloat w = norm * down * b.sum * (1 + b.product), r = root(rest) * b.sum + w * b.product;
  const vfloat reach = w + b.reach * down;
  const vfloat error = r * b.packed_norm + w * b.residual + 3.0f;
  const vfloat margin = (2 * error + reach * reach * b.literal * back + b.tiny) * (1 + 0x1p-16f);
  const vint narrow = margin <= (float)kWidest;
  const vint units = __builtin_convertvector(narrow ? margin : vfloat{}, vint) + 1;
  return narrow & ~open ? units : all(INT32_MAX);
}

}  // namespace
}  // namespace vqk
