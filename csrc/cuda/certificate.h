// When a row is certain. Everything the search does serves one inequality.
//
// Points p (codes, or points of the dithered curve) and rows x are compared in units of 2^-a, a = 0 where the
// tensor cores multiply the inputs themselves: c = 2^a p, ch its half copy, C = max |c|, R = max |c - ch|,
// Ch = C + R, B = C^2 / 2. A row x' = 2^a x has a half copy of its own, xh, also scaled by a power of two of
// its own, which the search undoes exactly; r = |x' - xh| is measured. The index wanted minimises
// v_j = |c_j|^2 / 2 - x'.c_j, and the search forms v^_j from xh, ch and the float32 half norm. With u =
// 2^-24,
//
//   |v^_j - v_j| <= E = r Ch + |x'| R                      the roundings to halves (Cauchy-Schwarz)
//                     + kappa |xh| Ch                      the products; |xh| <= |x'| + r
//                     + u B + (D + 16) 2^-52 B             the half norm, summed in float64
//                     + q                                  fixed point of step q
//                     + 4 (D + 2) 2^-126 (1 + |x'| + C)    underflow, where inputs are multiplied themselves
//
// kappa = s / (1 - s), s = (20 ceil(D/16) + 4) u: a tensor core aligns and truncates the 17 addends of each
// 16 features and truncates their sum, 2^-23 + 17 u, and any order of fused or unfused float32 operations is
// better than that. Fixed point: the half norm is rounded to the step when reach and 2^m are added (q/2), the
// difference again (q/2), and q = 2^(m - 23) is at least 2^-23 of every sum formed, which also holds the
// float32 rounding of the pass that looks for candidates. The norms are float64 sums of D terms; kSlack
// covers them.
//
// The contract's distance d is within (D + 3) 2^-53 d + D 2^-1075 of the real one, and d <= (|x| + |p|)^2, so
// T = (D + 4) 2^-52 (|x'| + C)^2 + (D + 2) 2^-1074 2^2a bounds half of it twice over. So
// - a best score more than 2 (E + T) ahead of the second is the contract's winner;
// - with d the distance of any code in float64, the contract's winner has v^ <= (d - |x|^2) 2^2a / 2 + E + 3
// T. What is not finite, or beyond what float32 and float64 hold, is not certain.
#pragma once

#include <math.h>
#include <stdint.h>

#include "top.h"

namespace vqk::cuda {

constexpr double kSlack = 1 + 1e-6;

// of the points, in units of 2^-a
struct Reach {
  double norm, lost;  // C, R
  int exponent;       // a
};

struct Bound {
  double error, literal;  // E, T
  bool holds;
};

// x: |x'|; lost: r; step: q, 0 where the search could not hold the row
VQK_BOTH Bound bound_of(double x, double lost, double step, int64_t features, const Reach& reach) {
  const double d = (double)features, c = reach.norm, half = c + reach.lost, b = 0.5 * c * c;
  const double s = (20.0 * (double)((features + 15) / 16) + 4.0) * 0x1p-24, kappa = s / (1 - s);
  const double both = x + c;
  Bound bound;
  bound.error = (lost * half + x * reach.lost + kappa * (x + lost) * half +
                 (0x1p-24 + (d + 16) * 0x1p-52) * b + step + 4 * (d + 2) * 0x1p-126 * (1 + both)) *
                kSlack;
  bound.literal = ((d + 4) * 0x1p-52 * both * both + (d + 2) * ldexp(0x1p-1074, 2 * reach.exponent)) * kSlack;
  // written so that a NaN refuses
  bound.holds = s < 0.5 && step > 0 && both < 0x1p60 && ldexp(both, -reach.exponent) < 0x1p511;
  return bound;
}

}  // namespace vqk::cuda
