// From keys to answers: which codes the certificate leaves in question, and which of them is nearest.
#pragma once

#include "literal.h"
#include "scores.h"

namespace vqk {
namespace {

VQK_INLINE void answer(const Search& s, int64_t row, int64_t index, double sq_dist) {
  s.indices[row] = index;
  if (s.wide)
    ((double*)s.sq_dist)[row] = sq_dist;
  else
    ((float*)s.sq_dist)[row] = (float)sq_dist;
}

// a tile of rows after all codes
template <class X>
struct Tile {
  const X* raw;  // (kRows, ld)
  int64_t ld, first, rows;
  const vint* x;                 // (pairs, 2)
  const vint *shifts, *margins;  // (2)
  const vfloat* lengths;         // (2): |P x'|, rounded up
  const Slot* slots;             // (kSlots)
};

// the codes of one tile that are in question for a row
template <class X, class C>
VQK_INLINE void question(const Search& s, const Tile<X>& t, int row, int64_t tile, uint32_t places,
                         int32_t bar, Best* best, Pairs<X, C>& pairs, int64_t* asked) {
  // where many codes are in question the search of open rows is the faster one
  if (asked[row] > s.codes.count / 8 + 64) return;
  const int64_t d = s.codes.features, count = (d + 1) / 2;
  const int32_t* const x = (const int32_t*)t.x + row;
  const vint scores = scores_of(x, s.codes.packed + tile * count * kCodes, s.codes.half_norms + tile * kCodes,
                                count, smaller(((const int32_t*)t.shifts)[row], 31));
  uint32_t hits = at_least(scores, all(bar)) & places & ~(uint32_t)s.codes.absent[tile];
  asked[row] += __builtin_popcount(hits);
  for (; hits; hits &= hits - 1) {
    const int64_t j = tile * kCodes + __builtin_ctz(hits);
    pairs.add(t.raw + row * t.ld, (const C*)s.codes.rows + j * d, best + row, j, d);
  }
}

// what no usual code's distance to the row falls below, as the contract rounds it: |x - c| >= |x'| - C; 0
// where the row says nothing
template <class X>
VQK_INLINE double usual_beyond(const Search& s, const X* row) {
  const int64_t d = s.codes.features;
  double square = 0;
  for (int64_t k = 0; k < d; ++k) {
    const double e = (double)row[k] - s.codes.centre[k];
    square += e * e;
  }
  // also false for a NaN; nothing below may leave the normal range
  if (!(square > 0x1p-900 && square < 0x1p900 && s.codes.reach < 0x1p450)) return 0;
  const double rounding = (double)(d + 32) * 0x1p-51;
  const double gap = __builtin_sqrt(square) * (1 - rounding) - s.codes.reach * (1 + rounding);
  return gap > 0x1p-450 ? gap * gap * (1 - rounding) : 0;
}

// returns how many rows stay open
template <class X, class C>
int64_t settle(const Search& s, const Bounds& b, const Tile<X>& t) {
  const int64_t d = s.codes.features, tiles = (s.codes.count + kCodes - 1) / kCodes;
  constexpr uint32_t every = (1u << kCodes) - 1, group = (1u << kGroup) - 1;
  Best best[kRows];
  Pairs<X, C> pairs;
  uint32_t open = 0;
  int64_t asked[kRows] = {};
  for (int v = 0; v < 2; ++v) {
    vint top = t.slots[0].best[v];
    for (int q = 1; q < kSlots; ++q) top = larger(top, t.slots[q].best[v]);
    const vint margin = t.margins[v];
    // an open row's margin is INT32_MAX: no lane of it is looked at
    const vint refused = margin == INT32_MAX;
    const vint bar = ((top & b.keep) - (s.exact & ~refused ? margin : vint{})) & b.keep;
    const int64_t left = t.rows - v * kWidth;
    const uint32_t present = left >= kWidth ? (uint32_t)((1ull << kWidth) - 1)
                             : left > 0     ? (1u << left) - 1
                                            : 0;
    const uint32_t alive = present & ~at_least(margin, all(INT32_MAX));
    open |= (present & ~alive) << (v * kWidth);
    for (int l = 0; l < kWidth; ++l) best[v * kWidth + l] = {kInf, INT64_MAX};
    for (int q = 0; q < kSlots; ++q) {
      const uint32_t seen = at_least(t.slots[q].best[v], bar) & alive;
      // a slot that hides a second contender names one group only: look at all its tiles
      const uint32_t hidden = s.exact ? at_least(t.slots[q].second[v], bar) & seen : 0;
      for (uint32_t m = hidden; m; m &= m - 1) {
        const int lane = __builtin_ctz(m);
        for (int64_t tile = q; tile < tiles; tile += kSlots)
          question<X, C>(s, t, v * kWidth + lane, tile, every, bar[lane], best, pairs, asked);
      }
      for (uint32_t m = seen & ~hidden; m; m &= m - 1) {
        const int lane = __builtin_ctz(m);
        const int32_t name = t.slots[q].best[v][lane] & ~b.keep;
        const int64_t tile = (int64_t)(name / kGroups) * kSlots + q;
        question<X, C>(s, t, v * kWidth + lane, tile, group << (name % kGroups * kGroup), bar[lane], best,
                       pairs, asked);
      }
    }
  }
  pairs.flush(d);
  for (int r = 0; r < t.rows; ++r)
    if (asked[r] > s.codes.count / 8 + 64) open |= 1u << r;
  // |x - c| >= |c'| - |x'|, so a far code needs a row that is long or has nothing near; and a row that the
  // scale of the others could not hold may be so near to a far one that none of them counts
  double beyond[kRows] = {};
  if (s.codes.far_count > 0)
    for (int r = 0; r < t.rows; ++r) {
      if (open >> r & 1) {
        beyond[r] = usual_beyond(s, t.raw + r * t.ld);
        if (beyond[r] == 0) continue;
      } else {
        const double length = (double)((const float*)t.lengths)[r] / s.codes.row_scale;
        if (s.codes.far_reach - length > __builtin_sqrt(best[r].sq_dist) * kSlack) continue;
      }
      for (int64_t q = 0; q < s.codes.far_count; ++q)
        pairs.add(t.raw + r * t.ld, (const C*)s.codes.rows + s.codes.far[q] * d, best + r, s.codes.far[q], d);
    }
  pairs.flush(d);
  for (int r = 0; r < t.rows; ++r)
    if (best[r].sq_dist < beyond[r]) open &= ~(1u << r);
  int64_t left_open = 0;
  for (int r = 0; r < t.rows; ++r) {
    if (!(open >> r & 1))
      answer(s, t.first + r, best[r].index, best[r].sq_dist);
    else if (finite(t.raw + r * t.ld, d))
      s.indices[t.first + r] = -1, ++left_open;
    else
      answer(s, t.first + r, 0, __builtin_nan(""));
  }
  return left_open;
}

}  // namespace
}  // namespace vqk
