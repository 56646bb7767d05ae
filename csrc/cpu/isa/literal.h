// The distance of the contract (METHODS section 1): features ascending, every operation rounded, none fused.
#pragma once

#include "convert.h"

namespace vqk {
namespace {

constexpr int kPairs = 8;

// of several pairs at once: squares in vectors, each pair's sum in order, eight sums interleaved
template <class X, class C>
void literal(const X* const* x, const C* const* c, int64_t d, double* out) {
  double acc[kPairs] = {};
  double t[kPairs][64];
  for (int64_t k0 = 0; k0 < d; k0 += 64) {
    const int64_t n = smaller(64, d - k0);
    for (int p = 0; p < kPairs; ++p) {
      const X* const xs = x[p] + k0;
      const C* const cs = c[p] + k0;
      for (int64_t k = 0; k < n; ++k) {
        const double e = (double)xs[k] - (double)cs[k];
        t[p][k] = e * e;
      }
    }
    for (int64_t k = 0; k < n; ++k)
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; ++p) acc[p] += t[p][k];
  }
  for (int p = 0; p < kPairs; ++p) out[p] = acc[p];
}

struct Best {
  double sq_dist;
  int64_t index;
};

VQK_INLINE void improve(Best& best, double sq_dist, int64_t index) {
  if (sq_dist < best.sq_dist || (sq_dist == best.sq_dist && index < best.index)) best = {sq_dist, index};
}

// pairs of a row and a code that wait for their distance
template <class X, class C>
struct Pairs {
  const X* x[kPairs];
  const C* c[kPairs];
  Best* best[kPairs];
  int64_t index[kPairs];
  int count = 0;

  void add(const X* row, const C* code, Best* into, int64_t j, int64_t d) {
    x[count] = row, c[count] = code, best[count] = into, index[count] = j;
    if (++count == kPairs) flush(d);
  }
  void flush(int64_t d) {
    if (count == 0) return;
    for (int p = count; p < kPairs; ++p) x[p] = x[0], c[p] = c[0];
    double out[kPairs];
    literal(x, c, d, out);
    for (int p = 0; p < count; ++p) improve(*best[p], out[p], index[p]);
    count = 0;
  }
};

}  // namespace
}  // namespace vqk
