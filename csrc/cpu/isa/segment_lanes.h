// Segments in float64, sixteen at a time, each lane in the contract's order: every one for rows that a
// certificate leaves open, and those set apart for the others.
#pragma once

#include "polyline.h"

namespace vqk {
namespace {

constexpr int kLanes = 16;
// features between two looks at whether any lane can still win
constexpr int64_t kStretch = 16;

// segments side by side: first code, step to the second, second code
struct Column {
  d8 first[2], step[2], second[2];
};

// what else is known of sixteen segments
struct Group {
  d8 length[2];
  i8 segment[2];
};

// the nearest point so far in each lane, and what a distance must be below to be looked at
struct Lanes {
  d8 sq_dist, position;
  i8 segment;
  double least;
};

VQK_INLINE bool any_of(i8 truth) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)truth, (__m512i)truth) != 0;
#else
  return ((truth[0] | truth[4]) | (truth[2] | truth[6])) | ((truth[1] | truth[5]) | (truth[3] | truth[7]));
#endif
}

// count <= sixteen segments in order
template <class C>
Group transpose(const Polyline& line, const int64_t* segments, int64_t count, Column* columns) {
  const int64_t d = line.features;
  Group group;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t s = lane < count ? segments[lane] : -1;
    const int half = lane / 8, q = lane % 8;
    const bool exists = usable(line, s);
    const C *const c = (const C*)line.rows + (exists ? s : 0) * d, *const next = c + d;
    group.length[half][q] = exists ? line.length[s] : 0;
    group.segment[half][q] = s;
    for (int64_t k = 0; k < d; ++k) {
      // a NaN never compares as smaller
      const double a = exists ? (double)c[k] : __builtin_nan(""), b = (double)next[k];
      columns[k].first[half][q] = a;
      columns[k].step[half][q] = b - a;
      columns[k].second[half][q] = b;
    }
  }
  return group;
}

VQK_INLINE d8 position_of(d8 along, d8 length) {
  // written so that a NaN stays
  d8 t = length > 0 ? along / length : d8{};
  t = t <= 0 ? d8{} : t;
  return t > 1 ? d8{} + 1.0 : t;
}

VQK_INLINE void keep(Lanes& lanes, d8 sq_dist, d8 position, i8 segment) {
  const i8 better = sq_dist < lanes.sq_dist;
  if (!any_of(better)) return;
  lanes.segment = better ? segment : lanes.segment;
  lanes.position = better ? position : lanes.position;
  lanes.sq_dist = better ? sq_dist : lanes.sq_dist;
  for (int q = 0; q < 8; ++q) lanes.least = sq_dist[q] < lanes.least ? sq_dist[q] : lanes.least;
}

// one row against sixteen segments
void project(const double* x, const Column* columns, const Group& group, int64_t d, Lanes& lanes) {
  d8 along0 = {}, along1 = {};
  for (int64_t k = 0; k < d; ++k) {
    const Column& c = columns[k];
    along0 += (x[k] - c.first[0]) * c.step[0];
    along1 += (x[k] - c.first[1]) * c.step[1];
  }
  const d8 t0 = position_of(along0, group.length[0]), t1 = position_of(along1, group.length[1]);
  const i8 end0 = t0 == 1, end1 = t1 == 1;
  d8 total0 = {}, total1 = {};
  for (int64_t k = 0; k < d;) {
    for (const int64_t stop = smaller(d, k + kStretch); k < stop; ++k) {
      const Column& c = columns[k];
      const d8 e0 = x[k] - (end0 ? c.second[0] : c.first[0] + t0 * c.step[0]);
      const d8 e1 = x[k] - (end1 ? c.second[1] : c.first[1] + t1 * c.step[1]);
      total0 += e0 * e0;
      total1 += e1 * e1;
    }
    // sums of squares only grow, and a later segment loses a tie
    if (!any_of((total0 < lanes.least) | (total1 < lanes.least))) return;
  }
  keep(lanes, total0, t0, group.segment[0]);
  keep(lanes, total1, t1, group.segment[1]);
}

// the nearest points of rows (count, d)
template <class C>
void project_all(const Polyline& line, const double* x, int64_t count, Column* columns, Lanes* lanes) {
  const int64_t d = line.features;
  for (int64_t r = 0; r < count; ++r)
    lanes[r] = {d8{} + __builtin_inf(), d8{}, i8{} + INT64_MAX, __builtin_inf()};
  for (int64_t begin = 0; begin + 1 < line.count; begin += kLanes) {
    int64_t segments[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) segments[lane] = begin + lane;
    const Group group = transpose<C>(line, segments, kLanes, columns);
    for (int64_t r = 0; r < count; ++r) project(x + r * d, columns, group, d, lanes[r]);
  }
}

VQK_INLINE Nearest nearest_of(const Lanes& lanes) {
  Nearest best = {__builtin_inf(), 0, INT64_MAX};
  for (int q = 0; q < 8; ++q) improve(best, lanes.sq_dist[q], lanes.position[q], lanes.segment[q]);
  return best;
}

// segments set apart, against rows (count, ld) whose best of the others is known; not those without a margin
template <class C>
void project_apart(const Polyline& line, const double* x, int64_t ld, int64_t count, const float* margin,
                   Column* columns, Nearest* best) {
  for (int64_t begin = 0; begin < line.apart_count; begin += kLanes) {
    const int64_t lanes_used = smaller(kLanes, line.apart_count - begin);
    const Group group = transpose<C>(line, line.apart + begin, lanes_used, columns);
    for (int64_t r = 0; r < count; ++r) {
      if (!(margin[r] < __builtin_inff())) continue;
      // an earlier segment wins a tie, so what is as near is looked at too
      const double least = best[r].sq_dist * kSlack + 0x1p-1000;
      Lanes lanes = {d8{} + __builtin_inf(), d8{}, i8{} + INT64_MAX, least};
      project(x + r * ld, columns, group, line.features, lanes);
      const Nearest apart = nearest_of(lanes);
      improve(best[r], apart.sq_dist, apart.position, apart.segment);
    }
  }
}

}  // namespace
}  // namespace vqk
