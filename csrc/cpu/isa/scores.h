// Scores of rows and codes as integers: a tile of both in registers, or one row against a tile of codes.
#pragma once

#include "bounds.h"

namespace vqk {
namespace {

// keys of two vectors of rows: of each slot the best group and the best of the others
struct Slot {
  vint best[2], second[2];
};

// what one slot would hold had it seen what both saw
VQK_INLINE Slot joined(const Slot& a, const Slot& b) {
  Slot both;
  for (int v = 0; v < 2; ++v) {
    both.best[v] = larger(a.best[v], b.best[v]);
    both.second[v] = larger(smaller_of(a.best[v], b.best[v]), larger(a.second[v], b.second[v]));
  }
  return both;
}

// scores of kRows rows against kCodes codes, folded into the rows' slot; a function of its own, since the
// sums leave no register for what a caller keeps
__attribute__((noinline)) void fold(const vint* x, const vint* shifts, const int32_t* c,
                                    const int32_t* half_norms, int64_t pairs, uint32_t absent, int32_t name,
                                    int32_t keep, Slot* slot) {
  vint a[kCodes][2];
  const vint shift0 = smaller_of(shifts[0], all(31)), shift1 = smaller_of(shifts[1], all(31));
#pragma GCC unroll 12
  for (int j = 0; j < kCodes; ++j) {
    const vint b = all(half_norms[j]);
    a[j][0] = b >> shift0;
    a[j][1] = b >> shift1;
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < pairs; ++k) {
    const vint x0 = x[2 * k], x1 = x[2 * k + 1];
#pragma GCC unroll 12
    for (int j = 0; j < kCodes; ++j) {
      const vint v = all(c[k * kCodes + j]);
      a[j][0] = dot(a[j][0], x0, v);
      a[j][1] = dot(a[j][1], x1, v);
    }
  }
  if (absent) {
#pragma GCC unroll 12
    for (int j = 0; j < kCodes; ++j)
      if (absent >> j & 1) a[j][0] = a[j][1] = all(INT32_MIN);
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    vint best = slot->best[v], second = slot->second[v];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      vint top = a[g * kGroup][v];
#pragma GCC unroll 4
      for (int j = 1; j < kGroup; ++j) top = larger(top, a[g * kGroup + j][v]);
      const vint key = mixed(top, all(keep), all(name + g));
      second = larger(second, smaller_of(best, key));
      best = larger(best, key);
    }
    slot->best[v] = best;
    slot->second[v] = second;
  }
}

// scores of one row, a lane of x, against kCodes codes; lanes past them hold nothing
VQK_INLINE vint scores_of(const int32_t* x, const int32_t* c, const int32_t* half_norms, int64_t pairs,
                          int64_t shift) {
  vint a = *(const vintu*)half_norms >> all((int32_t)shift), b = {};
  int64_t k = 0;
  for (; k + 2 <= pairs; k += 2) {
    a = dot(a, all(x[k * kRows]), *(const vintu*)(c + k * kCodes));
    b = dot(b, all(x[(k + 1) * kRows]), *(const vintu*)(c + (k + 1) * kCodes));
  }
  if (k < pairs) a = dot(a, all(x[k * kRows]), *(const vintu*)(c + k * kCodes));
  return a + b;
}

}  // namespace
}  // namespace vqk
