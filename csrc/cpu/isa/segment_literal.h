// The nearest point of a segment as the contract forms it (METHODS section 3): features ascending, every
// operation rounded, none fused.
#pragma once

#include "convert.h"

namespace vqk {
namespace {

// sums that run side by side, each in order, hide each other's latency
constexpr int kSums = 8;

// acc[p] += terms of p; terms(p, k0, n, out) writes terms k0 .. k0 + n - 1
template <class Terms>
VQK_INLINE void sum_in_order(int64_t d, double* acc, Terms terms) {
  double t[kSums][64];
  for (int64_t k0 = 0; k0 < d; k0 += 64) {
    const int64_t n = smaller(64, d - k0);
    for (int p = 0; p < kSums; ++p) terms(p, k0, n, t[p]);
    double a[kSums];
    for (int p = 0; p < kSums; ++p) a[p] = acc[p];
    for (int64_t k = 0; k < n; ++k)
#pragma GCC unroll 8
      for (int p = 0; p < kSums; ++p) a[p] += t[p][k];
    for (int p = 0; p < kSums; ++p) acc[p] = a[p];
  }
}

// |c_{s+1} - c_s|^2 of eight segments; a segment that is not wanted is given as any that exists
template <class C>
void lengths(const C* const* codes, int64_t d, double* out) {
  for (int p = 0; p < kSums; ++p) out[p] = 0;
  sum_in_order(d, out, [codes, d](int p, int64_t k0, int64_t n, double* t) {
    const C *const c = codes[p] + k0, *const next = c + d;
    for (int64_t k = 0; k < n; ++k) {
      const double step = (double)next[k] - (double)c[k];
      t[k] = step * step;
    }
  });
}

// the nearest point so far
struct Nearest {
  double sq_dist, position;
  int64_t segment;
};

// a distance that is not a number, where infinities met, never wins
VQK_INLINE void improve(Nearest& best, double sq_dist, double position, int64_t segment) {
  if (sq_dist < best.sq_dist || (sq_dist == best.sq_dist && segment < best.segment))
    best = {sq_dist, position, segment};
}

// pairs of a row and a segment that wait for their distance
template <class C>
struct Projections {
  const C* codes;
  const double* length;
  int64_t d;
  const double* x[kSums];
  const C* c[kSums];
  Nearest* best[kSums];
  int64_t segment[kSums];
  int count = 0;

  Projections(const C* codes, const double* length, int64_t d) : codes(codes), length(length), d(d) {}

  void add(const double* row, Nearest* into, int64_t s) {
    x[count] = row, c[count] = codes + s * d, best[count] = into, segment[count] = s;
    if (++count == kSums) flush();
  }
  void flush();
};

template <class C>
void Projections<C>::flush() {
  if (count == 0) return;
  for (int p = count; p < kSums; ++p) x[p] = x[0], c[p] = c[0], segment[p] = segment[0];
  double t[kSums] = {}, sq_dist[kSums] = {};
  const Projections& q = *this;
  sum_in_order(d, t, [&q](int p, int64_t k0, int64_t n, double* out) {
    const double* const row = q.x[p] + k0;
    const C *const first = q.c[p] + k0, *const second = first + q.d;
    for (int64_t k = 0; k < n; ++k)
      out[k] = (row[k] - (double)first[k]) * ((double)second[k] - (double)first[k]);
  });
  for (int p = 0; p < kSums; ++p) {
    const double squares = length[segment[p]], along = squares > 0 ? t[p] / squares : 0;
    // written so that a NaN stays, and without the zero's sign
    t[p] = along <= 0 ? 0 : along > 1 ? 1 : along;
  }
  sum_in_order(d, sq_dist, [&q, &t](int p, int64_t k0, int64_t n, double* out) {
    const double* const row = q.x[p] + k0;
    const C *const first = q.c[p] + k0, *const second = first + q.d;
    const double at = t[p];
    if (at == 1) {
      for (int64_t k = 0; k < n; ++k) {
        const double e = row[k] - (double)second[k];
        out[k] = e * e;
      }
      return;
    }
    for (int64_t k = 0; k < n; ++k) {
      const double e = row[k] - ((double)first[k] + at * ((double)second[k] - (double)first[k]));
      out[k] = e * e;
    }
  });
  for (int p = 0; p < count; ++p) improve(*best[p], sq_dist[p], t[p], segment[p]);
  count = 0;
}

}  // namespace
}  // namespace vqk
