// The certified search of segments. Everything below serves one inequality.
//
// With mu the centre, a power of two 2^a, x' = 2^a (x - mu), c'_s = 2^a (c_s - mu), v_s = x'.c'_s - |c'_s|^2
// / 2 and L_s = |c'_{s+1} - c'_s|^2, the segment wanted maximises
//
//   S_s = max_{0<=t<=1} (1 - t) v_s + t v_{s+1} + t (1 - t) L_s / 2 = |x'|^2 / 2 - dist_s^2 / 2.
//
// Its maximum over t is at q = (v_{s+1} - v_s) / L_s + 1/2 where that is inside. A nearest point at q >= 1 is
// the next node, which the next segment scores, so that a tie on a node is no tie here:
//
//   S'_s = v_s + w^2,  w = min(max(alpha (v_{s+1} - v_s) + beta, 0), 2 beta),  beta = sqrt(L / 8), alpha = 1
//   / (4 beta),
//
// is S_s for q <= 1 and no more than S_s elsewhere; after the last node of a run of usable segments follows
// one of no length. The search computes v^_s from xh = float32(x'), ch = float32(c'). With u = 2^-24, C =
// max|c'|, B = C^2 / 2, Ch = max|ch|, H = max L / 2, r = |x' - xh| and R = max|c' - ch| measured in float64:
//
//   |v^ - v| <= E = r Ch + |x'| R                          the roundings to float32 (Cauchy-Schwarz)
//                 + g (|xh| Ch + B), g = n u / (1 - n u), n = D + 2    the sum, in any order, fused or not
//                 + u B + (D + 16) 2^-52 B                 the half norm
//                 + 4 (D + 2) 2^-126                       underflow, also where subnormals are flushed
//   |S'^ - S'| <= F = E + 16 u H + 2 u (|xh| Ch + B) + 2^-100
//
// as S' moves by no more than v does, w carries at most 8 u beta of rounding, and points for short segments
// and what underflows cost less than 2^-100. The contract's own distance is within
//
//   2 T = 2^-51 (|x'| + C) (4 (D + 8) (|x'| + C) + max|2^a c|)
//
// of the real one: its t carries (2 D + 8) 2^-53 of the reach, the point it forms 2^-53 of the code's size.
// So the winner has S'^ of its own, or v^ of its second node, at most 2 (F + T) below the best S'^. Rows with
// a bound that is not finite, or outside the range that float32 and float64 hold, stay open.
//
// Segments with a far end are no part of any of this: their length would be every row's margin. They are few,
// and each row that is decided compares its best with them in float64.
#include "polyline.h"
#include "segment_lanes.h"

namespace vqk {
namespace {

constexpr float kInfF = __builtin_inff();

// tiles that stay in the first cache while the rows of a block pass by
constexpr int64_t kNearBytes = 1 << 14;

// as many segments in vectors take as long as a tile that contends, some of whose segments are settled one by
// one
constexpr int kCrowd = 16;

struct Slot {
  vfloat best, second;
  vint tile;
};

// what a vector of rows remembers: its slots, and the scores of the last node
struct Memo {
  Slot slots[kSlots];
  vfloat last;
};

VQK_INLINE void answer(const SegmentSearch& s, int64_t row, const Nearest& best) {
  s.segments[row] = best.segment;
  if (s.wide) {
    ((double*)s.position)[row] = best.position;
    ((double*)s.sq_dist)[row] = best.sq_dist;
  } else {
    ((float*)s.position)[row] = (float)best.position;
    ((float*)s.sq_dist)[row] = (float)best.sq_dist;
  }
}

struct Block {
  double* raw;      // (rows, ld): x
  float* packed;    // (rows / kRows, D, kRows): xh
  Memo* memos;      // (rows / kWidth)
  float* margin;    // (rows): 2 (F + T)
  Nearest* best;    // (rows)
  Column* columns;  // (D)
};

size_t search_scratch(int64_t d, int64_t rows) {
  const int64_t n = padded(rows, kRows);
  return (size_t)(n * (padded(d, 8) * 8 + d * 4 + 4 + (int64_t)sizeof(Nearest)) +
                  n / kWidth * (int64_t)sizeof(Memo) + d * (int64_t)sizeof(Column) + 6 * 64);
}

Block divide(void* scratch, int64_t d, int64_t rows) {
  char* at = (char*)scratch;
  const int64_t n = padded(rows, kRows);
  Block b;
  b.raw = (double*)take(at, n * padded(d, 8) * 8);
  b.packed = (float*)take(at, n * d * 4);
  b.memos = (Memo*)take(at, n / kWidth * (int64_t)sizeof(Memo));
  b.margin = (float*)take(at, n * 4);
  b.best = (Nearest*)take(at, n * (int64_t)sizeof(Nearest));
  b.columns = (Column*)take(at, d * (int64_t)sizeof(Column));
  return b;
}

// 2 (F + T) of a row from |x'|^2 and r^2, or inf
float margin_of(const SegmentSearch& s, double square, double rest) {
  const double d = (double)s.line.features;
  const double x = __builtin_sqrt(square) * kSlack, r = __builtin_sqrt(rest) * kSlack + 0x1p-52 * x;
  const double c = s.spread.norm, residual = s.spread.residual, half = s.spread.half_length;
  const double b = 0.5 * c * c, ch = c + residual, product = (x + r) * ch + b, reach = x + c;
  const double n = (d + 2) * 0x1p-24, g = n / (1 - n);
  // what float32 and float64 can hold, written so that a NaN refuses
  if (!(n < 0.5 && product + half < 0x1p100 && s.line.exponent <= kMostExponent &&
        s.line.exponent >= -kMostExponent && reach + s.spread.far < 0x1p100))
    return kInfF;
  const double score = r * ch + x * residual + g * product + (0x1p-24 + (d + 16) * 0x1p-52) * b +
                       4 * (d + 2) * 0x1p-126 + 16 * 0x1p-24 * half + 0x1p-23 * product + 0x1p-100;
  const double literal = 0x1p-52 * reach * (4 * (d + 8) * reach + s.spread.far);
  const double margin = 2 * (score + literal) * kSlack;
  // it is subtracted in float32
  return (float)(margin + 0x1p-22 * (product + half + margin));
}

// rows of a block, centred, scaled and rounded to float32, and what that costs in accuracy
void prepare(const SegmentSearch& s, const Block& b, int64_t begin, int64_t rows) {
  const int64_t d = s.x.features, ld = padded(d, 8);
  load(s.x, begin, rows, b.raw, ld);
  for (int64_t r = 0; r < padded(rows, kRows); ++r) {
    float* const out = b.packed + r / kRows * d * kRows + r % kRows;
    b.best[r] = {kInf, 0, INT64_MAX};
    if (r >= rows) {
      for (int64_t k = 0; k < d; ++k) out[k * kRows] = 0;
      b.margin[r] = kInfF;
      continue;
    }
    double* const x = b.raw + r * ld;
    d8 squares = {}, rests = {};
    for (int64_t k = d; k < ld; ++k) x[k] = 0;
    for (int64_t k = 0; k < ld; k += 8) {
      const d8 v = (load8(x + k) - load8(s.line.centre + k)) * s.line.scale;
      const f8 h = __builtin_convertvector(v, f8);
      const d8 e = v - __builtin_convertvector(h, d8);
      squares += v * v;
      rests += e * e;
      const int64_t n = smaller(8, d - k);
      for (int64_t q = 0; q < n; ++q) out[(k + q) * kRows] = h[q];
    }
    b.margin[r] = margin_of(s, sum(squares), sum(rests));
  }
  for (int64_t m = 0; m < padded(rows, kRows) / kWidth; ++m) {
    for (int slot = 0; slot < kSlots; ++slot)
      b.memos[m].slots[slot] = {vfloat{} - kInfF, vfloat{} - kInfF, vint{}};
    b.memos[m].last = vfloat{};
  }
}

// bit i: lane i is true
VQK_INLINE unsigned lanes_of(vint truth) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)truth, (__m512i)truth);
#elif defined(__AVX2__)
  return (unsigned)_mm256_movemask_ps((__m256)truth);
#else
  unsigned bits = 0;
  for (int lane = 0; lane < kWidth; ++lane) bits |= (unsigned)(truth[lane] & 1) << lane;
  return bits;
#endif
}

// the best segment of one tile for kRows rows, folded into their slots
void fold(const float* x, const Polyline& line, int64_t tile, Memo* memos) {
  const int64_t d = line.features;
  const float* const c = line.packed + tile * d * kEnds + 1;
  const float* const bias = line.bias + tile * kEnds + 1;
  const float* const bends = line.bends + tile * 3 * kNodes;
  vfloat v[kNodes][2];
#pragma GCC unroll 12
  for (int j = 0; j < kNodes; ++j) v[j][0] = v[j][1] = all(bias[j]);
#pragma GCC unroll 1
  for (int64_t k = 0; k < d; ++k) {
    const vfloat x0 = *(const vfloat*)(x + k * kRows), x1 = *(const vfloat*)(x + k * kRows + kWidth);
#pragma GCC unroll 12
    for (int j = 0; j < kNodes; ++j) {
      const vfloat code = all(c[k * kEnds + j]);
      v[j][0] = fused(x0, code, v[j][0]);
      v[j][1] = fused(x1, code, v[j][1]);
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    vfloat node = memos[h].last, top = vfloat{} - kInfF;
#pragma GCC unroll 12
    for (int j = 0; j < kNodes; ++j) {
      vfloat w = fused(v[j][h] - node, all(bends[j]), all(bends[kNodes + j]));
      // where one operand is a NaN the second is taken: that of a limit stays, then loses
      w = smaller_of(larger(w, vfloat{}), all(bends[2 * kNodes + j]));
      top = larger(fused(w, w, node), top);
      node = v[j][h];
    }
    memos[h].last = node;
    Slot& slot = memos[h].slots[tile % kSlots];
    const vfloat best = slot.best;
    slot.second = larger(smaller_of(best, top), slot.second);
    slot.best = larger(best, top);
    slot.tile = top > best ? vint{} + (int)tile : slot.tile;
  }
}

// a row and a tile whose segments may win
struct Job {
  const float* x;  // stride kRows
  const double* row;
  Nearest* best;
  int64_t tile;
  float bar;
};

constexpr int kJobs = 4;
constexpr int kVectors = (kEnds + kWidth - 1) / kWidth;

// nodes of one row side by side: which segments of a tile reach the bar
template <class C>
struct Jobs {
  const Polyline& line;
  Projections<C>& open;
  Job job[kJobs];
  int count = 0;

  Jobs(const Polyline& line, Projections<C>& open) : line(line), open(open) {}

  void add(const Job& next) {
    job[count] = next;
    if (++count == kJobs) flush();
  }

  void flush() {
    if (count == 0) return;
    const int64_t d = line.features;
    const float *x[kJobs], *c[kJobs];
    vfloat v[kJobs][kVectors];
    for (int i = 0; i < kJobs; ++i) {
      const Job& from = job[i < count ? i : 0];
      x[i] = from.x, c[i] = line.packed + from.tile * d * kEnds;
      for (int n = 0; n < kVectors; ++n) v[i][n] = any(line.bias + from.tile * kEnds + n * kWidth);
    }
    for (int64_t k = 0; k < d; ++k)
#pragma GCC unroll 4
      for (int i = 0; i < kJobs; ++i)
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n)
          v[i][n] = fused(all(x[i][k * kRows]), any(c[i] + k * kEnds + n * kWidth), v[i][n]);
    for (int i = 0; i < count; ++i) pick(job[i], v[i]);
    count = 0;
  }

 private:
  // unaligned; its last lanes may belong to what follows
  static inline __attribute__((always_inline)) vfloat any(const float* p) {
    vfloat v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }

  void pick(const Job& from, const vfloat* v) {
    const float* const bends = line.bends + from.tile * 3 * kNodes;
    float nodes[kVectors * kWidth + 1];
    __builtin_memcpy(nodes, v, sizeof(float) * kVectors * kWidth);
    nodes[kVectors * kWidth] = 0;
    unsigned own = 0, ends = 0;
    for (int n = 0; n < kVectors; ++n) {
      const int at = n * kWidth;
      vfloat w = fused(any(nodes + at + 1) - v[n], any(bends + at), any(bends + kNodes + at));
      w = smaller_of(larger(w, vfloat{}), any(bends + 2 * kNodes + at));
      own |= lanes_of(fused(w, w, v[n]) >= all(from.bar)) << at;
      ends |= lanes_of(v[n] >= all(from.bar)) << at;
    }
    // a segment is named by its own score or by that of its second node, which may lie in the next tile
    const int64_t before = from.tile * kNodes - 2;
    const unsigned in_tile = (1u << kNodes) - 1;
    for (unsigned left = (own & in_tile) << 1 | (ends & in_tile); left; left &= left - 1) {
      const int64_t segment = before + __builtin_ctz(left);
      if (searched(line, segment)) open.add(from.row, from.best, segment);
    }
  }
};

// whether all segments in vectors take less time than those that contend, one by one
VQK_INLINE bool crowded(const Polyline& line, unsigned named, unsigned hidden) {
  const int tiles = __builtin_popcount(named);
  return __builtin_popcount(hidden) > kSlots / 2 || (tiles > kSlots / 2 && kCrowd * tiles > line.count);
}

template <class C>
void settle(const SegmentSearch& s, const Block& b, int64_t begin, int64_t rows, int64_t tiles) {
  const int64_t d = s.x.features, ld = padded(d, 8);
  Projections<C> open((const C*)s.line.rows, s.line.length, d);
  Jobs<C> jobs(s.line, open);
  for (int64_t m = 0; m * kWidth < rows; ++m) {
    const Memo& memo = b.memos[m];
    vfloat top = memo.slots[0].best;
    for (int slot = 1; slot < kSlots; ++slot) top = larger(memo.slots[slot].best, top);
    const vfloat bar = top - *(const vfloat*)(b.margin + m * kWidth);
    vint named = {}, hidden = {};
    for (int slot = 0; slot < kSlots; ++slot) {
      named |= (memo.slots[slot].best >= bar) & (1 << slot);
      hidden |= (memo.slots[slot].second >= bar) & (1 << slot);
    }
    for (int64_t r = m * kWidth; r < smaller(rows, (m + 1) * kWidth); ++r) {
      const int lane = (int)(r - m * kWidth);
      double* const row = b.raw + r * ld;
      if (!(b.margin[r] < kInfF)) continue;
      if (crowded(s.line, (unsigned)named[lane], (unsigned)hidden[lane])) {
        b.margin[r] = kInfF;
        continue;
      }
      Job job = {b.packed + r / kRows * d * kRows + r % kRows, row, b.best + r, 0, bar[lane]};
      for (unsigned left = (unsigned)named[lane]; left; left &= left - 1) {
        const int slot = __builtin_ctz(left);
        if (hidden[lane] >> slot & 1) {
          for (job.tile = slot; job.tile < tiles; job.tile += kSlots) jobs.add(job);
        } else {
          job.tile = memo.slots[slot].tile[lane];
          jobs.add(job);
        }
      }
    }
  }
  jobs.flush();
  open.flush();
  project_apart<C>(s.line, b.raw, ld, rows, b.margin, b.columns, b.best);
  for (int64_t r = 0; r < rows; ++r) {
    if (b.margin[r] < kInfF)
      answer(s, begin + r, b.best[r]);
    else if (finite(b.raw + r * ld, d))
      s.segments[begin + r] = -1;
    else
      answer(s, begin + r, {__builtin_nan(""), 0, 0});
  }
}

void search(const SegmentSearch& s, int64_t begin, int64_t end, void* scratch) {
  const int64_t d = s.x.features, rows = end - begin, tiles = s.line.count / kNodes + 1;
  const Block b = divide(scratch, d, rows);
  prepare(s, b, begin, rows);
  int64_t at_once = kNearBytes / (kEnds * d * 4);
  at_once = at_once < 1 ? 1 : at_once;
  for (int64_t first = 0; first < tiles; first += at_once)
    for (int64_t r = 0; r < rows; r += kRows)
      for (int64_t tile = first; tile < smaller(tiles, first + at_once); ++tile)
        fold(b.packed + r * d, s.line, tile, b.memos + r / kWidth);
  if (s.line.wide)
    settle<double>(s, b, begin, rows, tiles);
  else
    settle<float>(s, b, begin, rows, tiles);
}

// ---- rows that stay open ----

size_t rescore_scratch(int64_t d, int64_t rows) {
  return (size_t)(d * (int64_t)sizeof(Column) + rows * ((int64_t)sizeof(Lanes) + d * 8) + 3 * 64);
}

void rescore(const SegmentSearch& s, const int64_t* rows, int64_t count, void* scratch) {
  const int64_t d = s.x.features;
  char* at = (char*)scratch;
  Column* const columns = (Column*)take(at, d * (int64_t)sizeof(Column));
  Lanes* const lanes = (Lanes*)take(at, count * (int64_t)sizeof(Lanes));
  double* const x = (double*)take(at, count * d * 8);
  for (int64_t r = 0; r < count; ++r) load(s.x, rows[r], 1, x + r * d, d);
  if (s.line.wide)
    project_all<double>(s.line, x, count, columns, lanes);
  else
    project_all<float>(s.line, x, count, columns, lanes);
  for (int64_t r = 0; r < count; ++r) {
    const Nearest best = nearest_of(lanes[r]);
    // where every distance overflows, the lowest usable segment has the least of them
    answer(s, rows[r], best.sq_dist < kInf ? best : Nearest{kInf, 0, s.line.first_usable});
  }
}

}  // namespace

namespace VQK_ISA {
extern const NearestSegmentKernels nearest_segment;
const NearestSegmentKernels nearest_segment = {kNodes,         kRows,  copy_codes,      survey, pack,
                                               search_scratch, search, rescore_scratch, rescore};
}  // namespace VQK_ISA

}  // namespace vqk
