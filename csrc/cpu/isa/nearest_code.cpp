// The certified search. Everything below serves one inequality.
//
// With mu the centre, a power of two 2^a, x' = 2^a (x - mu), c' = 2^a (c - mu), the index wanted minimises
// |x' - c'|^2, that is, it maximises s_j = x'.c'_j - |c'_j|^2 / 2. The search computes s^_j from xh =
// float32(x') and ch = float32(c'), beginning at -b_j = -float32(|c'_j|^2 / 2) and adding D products. With u
// = 2^-24, C = max|c'|, B = C^2 / 2, Ch = max|ch|, r_x = |x' - xh| and R = max|c' - ch| measured in float64:
//
//   |s^_j - s_j| <= E = r_x Ch + |x'| R                      the roundings to float32 (Cauchy-Schwarz)
//                     + g (|xh| Ch + B), g = n u / (1 - n u), n = D + 2     the sum, fused or not
//                     + u B + (D + 16) 2^-52 B               the half norm
//                     + 4 (D + 2) 2^-126                     underflow, also where subnormals are flushed
//
// Centring and scaling in float64 round x' and c' by 2^-53 relative, which r_x and R include. The contract's
// own distance d is a sum of D rounded squares of rounded differences, within (D + 3) 2^-53 d + D 2^-1075 of
// the real one, and d <= (|x'| + C)^2 2^-2a for every code: T = (D + 4) 2^-52 (|x'| + C)^2 + (D + 2) 2^-1074
// 2^2a bounds it in scaled units with room to spare. So a code with s^ < max s^ - 2 (E + T) cannot win. An E
// that is not finite, scores that float32 cannot hold and distances that float64 cannot hold leave the row
// open.
#include "../kernels.h"
#include "convert.h"
#include "literal.h"
#include "simd.h"

namespace vqk {
namespace {

constexpr double kInf = __builtin_inf();
constexpr float kInfF = __builtin_inff();
// covers the rounding of sums of float64 squares and of the bound itself
constexpr double kSlack = 1 + 1e-8;

VQK_INLINE int64_t padded(int64_t d, int64_t to) { return (d + to - 1) / to * to; }
VQK_INLINE double narrowed(double v) { return (double)(float)v; }
VQK_INLINE d8 load8(const double* p) { return *(const d8u*)p; }
VQK_INLINE d8 load8(const float* p) { return __builtin_convertvector(*(const f8u*)p, d8); }

// ---- prepare ----

void points(const Rows& codebook, const Rows& dither, int64_t begin, int64_t end, bool wide, void* out) {
  const int64_t d = codebook.features;
  if (!dither.data) {
    if (wide)
      load(codebook, begin, end - begin, (double*)out + begin * d, d);
    else
      load(codebook, begin, end - begin, (float*)out + begin * d, d);
    return;
  }
  for (int64_t s = begin; s < end; ++s) {
    // the second code stands in the row of the next point, or in `last` where that row is another thread's
    double* const p = (double*)out + s * d;
    double weight;
    load(dither, s, 1, &weight, 1);
    load(codebook, s, 1, p, d);
    for (int64_t k0 = 0; k0 < d; k0 += 64) {
      double next[64];
      Rows part = codebook;
      part.data += k0 * part.stride_feature * size_of(part.type);
      part.features = smaller(64, d - k0);
      load(part, s + 1, 1, next, 64);
      for (int64_t k = 0; k < part.features; ++k) p[k0 + k] = (1 - weight) * p[k0 + k] + weight * next[k];
    }
  }
}

template <class C>
void survey_rows(const Codes& codes, int64_t begin, int64_t end, Spread* spread) {
  double largest = 0;
  for (int64_t j = begin; j < end; ++j) {
    const C* const c = (const C*)codes.rows + j * codes.features;
    codes.finite[j] = finite(c, codes.features);
    if (!codes.finite[j]) continue;
    for (int64_t k = 0; k < codes.features; ++k) {
      const double a = __builtin_fabs((double)c[k] - codes.centre[k]);
      largest = a > largest ? a : largest;
    }
  }
  spread->largest = largest;
}

void survey(const Codes& codes, int64_t begin, int64_t end, Spread* spread) {
  return codes.wide ? survey_rows<double>(codes, begin, end, spread)
                    : survey_rows<float>(codes, begin, end, spread);
}

template <class C>
void pack_rows(const Codes& codes, int64_t panel_begin, int64_t panel_end, Spread* spread) {
  const int64_t d = codes.features;
  double norm = 0, residual = 0;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    float* const panel = codes.packed + p * d * kPanel;
    for (int lane = 0; lane < kPanel; ++lane) {
      const int64_t j = p * kPanel + lane;
      if (j >= codes.count || !codes.finite[j]) {
        for (int64_t k = 0; k < d; ++k) panel[k * kPanel + lane] = 0;
        codes.bias[j] = -kInfF;
        continue;
      }
      const C* const c = (const C*)codes.rows + j * d;
      d8 squares = {}, residuals = {};
      double tail_square = 0, tail_residual = 0;
      int64_t k = 0;
      for (; k + 8 <= d; k += 8) {
        const d8 v = (load8(c + k) - load8(codes.centre + k)) * codes.scale;
        const f8 h = __builtin_convertvector(v, f8);
        const d8 r = v - __builtin_convertvector(h, d8);
        squares += v * v;
        residuals += r * r;
        for (int q = 0; q < 8; ++q) panel[(k + q) * kPanel + lane] = h[q];
      }
      for (; k < d; ++k) {
        const double v = ((double)c[k] - codes.centre[k]) * codes.scale, r = v - narrowed(v);
        tail_square += v * v;
        tail_residual += r * r;
        panel[k * kPanel + lane] = (float)v;
      }
      const double square = sum(squares) + tail_square, rest = sum(residuals) + tail_residual;
      codes.bias[j] = (float)(-0.5 * square);
      // written so that a NaN stays
      norm = square <= norm ? norm : square;
      residual = rest <= residual ? residual : rest;
    }
  }
  spread->norm = __builtin_sqrt(norm) * kSlack;
  spread->residual = __builtin_sqrt(residual) * kSlack + 0x1p-52 * spread->norm;
}

void pack(const Codes& codes, int64_t panel_begin, int64_t panel_end, Spread* spread) {
  return codes.wide ? pack_rows<double>(codes, panel_begin, panel_end, spread)
                    : pack_rows<float>(codes, panel_begin, panel_end, spread);
}

// ---- search ----

VQK_INLINE void answer(const Search& s, int64_t row, int64_t index, double sq_dist) {
  s.indices[row] = index;
  if (s.wide)
    ((double*)s.sq_dist)[row] = sq_dist;
  else
    ((float*)s.sq_dist)[row] = (float)sq_dist;
}

// what a row remembers of each slot: its best and second best maximum, and the panel of the best
struct Slots {
  vfloat best, second;
  vint panel;
};

struct Block {
  double* raw;     // (rows, ld): x
  float* tiles;    // (tiles, D, kTile): xh
  Slots* slots;    // (rows)
  double* margin;  // (rows): 2 (E + T)
  Best* best;      // (rows)
};

VQK_INLINE char* take(char*& at, int64_t bytes) {
  char* const here = at;
  at += padded(bytes, 64);
  return here;
}

Block divide(void* scratch, int64_t d, int64_t rows) {
  char* at = (char*)scratch;
  const int64_t n = padded(rows, kTile);
  Block b;
  b.raw = (double*)take(at, n * padded(d, 8) * 8);
  b.tiles = (float*)take(at, n * d * 4);
  b.slots = (Slots*)take(at, n * (int64_t)sizeof(Slots));
  b.margin = (double*)take(at, n * 8);
  b.best = (Best*)take(at, n * (int64_t)sizeof(Best));
  return b;
}

size_t search_scratch(int64_t d, int64_t rows) {
  const int64_t n = padded(rows, kTile);
  return (size_t)(n * (padded(d, 8) * 8 + d * 4 + (int64_t)(sizeof(Slots) + 8 + sizeof(Best))) + 5 * 64);
}

// 2 (E + T) of a row from x and its residual, or inf
double margin_of(const Search& s, double square, double rest) {
  const double d = (double)s.codes.features;
  const double x = __builtin_sqrt(square) * kSlack, r = __builtin_sqrt(rest) * kSlack + 0x1p-52 * x;
  const double c = s.spread.norm, residual = s.spread.residual, b = 0.5 * c * c, ch = c + residual,
               xh = x + r;
  const double n = (d + 2) * 0x1p-24, g = n / (1 - n), reach = x + c;
  // what float32 and float64 can hold, written so that a NaN refuses
  if (!(n < 0.5 && xh * ch + b < 0x1p126 && __builtin_ldexp(reach, -s.codes.exponent) < 0x1p511)) return kInf;
  const double error =
      r * ch + x * residual + g * (xh * ch + b) + (0x1p-24 + (d + 16) * 0x1p-52) * b + 4 * (d + 2) * 0x1p-126;
  const double literal_error =
      (d + 4) * 0x1p-52 * reach * reach + (d + 2) * __builtin_ldexp(0x1p-1074, 2 * s.codes.exponent);
  return 2 * (error + literal_error) * kSlack;
}

// rows of a block, centred, scaled and rounded to float32, and what that costs in accuracy
void prepare(const Search& s, const Block& b, int64_t begin, int64_t rows) {
  const int64_t d = s.x.features, ld = padded(d, 8);
  load(s.x, begin, rows, b.raw, ld);
  for (int64_t r = 0; r < padded(rows, kTile); ++r) {
    float* const tile = b.tiles + r / kTile * d * kTile + r % kTile;
    b.slots[r] = {vfloat{} - kInfF, vfloat{} - kInfF, vint{}};
    b.best[r] = {kInf, INT64_MAX};
    if (r >= rows) {
      for (int64_t k = 0; k < d; ++k) tile[k * kTile] = 0;
      continue;
    }
    double* const x = b.raw + r * ld;
    d8 squares = {}, residuals = {};
    for (int64_t k = d; k < ld; ++k) x[k] = 0;
    for (int64_t k = 0; k < ld; k += 8) {
      const d8 v = (load8(x + k) - load8(s.codes.centre + k)) * s.codes.scale;
      const f8 h = __builtin_convertvector(v, f8);
      const d8 e = v - __builtin_convertvector(h, d8);
      squares += v * v;
      residuals += e * e;
      const int64_t n = smaller(8, d - k);
      for (int64_t q = 0; q < n; ++q) tile[(k + q) * kTile] = h[q];
    }
    b.margin[r] = margin_of(s, sum(squares), sum(residuals));
  }
}

// scores of kTile rows against one panel, folded into the rows' slots
void fold(const float* x, const float* c, const float* bias, int64_t d, int panel, Slots* slots) {
  vfloat a[kTile][2];
#pragma GCC unroll 12
  for (int r = 0; r < kTile; ++r) {
    a[r][0] = *(const vfloat*)bias;
    a[r][1] = *(const vfloat*)(bias + kWidth);
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < d; ++k) {
    const vfloat c0 = *(const vfloat*)(c + k * kPanel), c1 = *(const vfloat*)(c + k * kPanel + kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < kTile; ++r) {
      const vfloat v = x[k * kTile + r] - vfloat{};
      a[r][0] = fused(v, c0, a[r][0]);
      a[r][1] = fused(v, c1, a[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kTile; ++r) {
    Slots& s = slots[r];
    const vfloat top = larger(a[r][0], a[r][1]), best = s.best;
    s.second = larger(s.second, smaller_of(best, top));
    s.best = larger(best, top);
    s.panel = top > best ? vint{} + panel : s.panel;
  }
}

template <class C>
void settle(const Search& s, const Block& b, int64_t begin, int64_t rows) {
  const int64_t d = s.x.features, ld = padded(d, 8);
  const C* const codes = (const C*)s.codes.rows;
  Pairs<C> pairs;
  for (int64_t r = 0; r < rows; ++r) {
    const double* const x = b.raw + r * ld;
    s.indices[begin + r] = -1;
    if (!(b.margin[r] < kInf)) {
      if (!finite(x, d)) answer(s, begin + r, 0, __builtin_nan(""));
      continue;
    }
    const float* const best = (const float*)&b.slots[r].best;
    const float* const second = (const float*)&b.slots[r].second;
    const int32_t* const panel = (const int32_t*)&b.slots[r].panel;
    float top = best[0], next = second[0];
    for (int lane = 1; lane < kWidth; ++lane) {
      top = best[lane] > top ? best[lane] : top;
      next = second[lane] > next ? second[lane] : next;
    }
    const double bar = s.exact ? (double)top - b.margin[r] : (double)top;
    // a slot that hides a second contender cannot say which codes contend
    if (s.exact && (double)next >= bar) continue;
    s.indices[begin + r] = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      if (!((double)best[lane] >= bar)) continue;
      for (int half = 0; half < 2; ++half) {
        const int64_t j = (int64_t)panel[lane] * kPanel + half * kWidth + lane;
        if (j < s.codes.count && s.codes.finite[j]) pairs.add(x, codes + j * d, b.best + r, j, d);
      }
    }
  }
  pairs.flush(d);
  for (int64_t r = 0; r < rows; ++r)
    if (s.indices[begin + r] == 0 && b.margin[r] < kInf)
      answer(s, begin + r, b.best[r].index, b.best[r].sq_dist);
}

void search(const Search& s, int64_t begin, int64_t end, void* scratch) {
  const int64_t d = s.x.features, rows = end - begin, panels = (s.codes.count + kPanel - 1) / kPanel;
  const Block b = divide(scratch, d, rows);
  prepare(s, b, begin, rows);
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t r = 0; r < rows; r += kTile)
      fold(b.tiles + r * d, s.codes.packed + p * d * kPanel, s.codes.bias + p * kPanel, d, (int)p,
           b.slots + r);
  if (s.codes.wide)
    settle<double>(s, b, begin, rows);
  else
    settle<float>(s, b, begin, rows);
}

// ---- rows that stay open: every code, sixteen at a time, each lane in the contract's order ----

constexpr int kLanes = 16;

struct Lanes {
  d8 sq_dist;
  i8 index;
};

size_t rescore_scratch(int64_t d, int64_t rows) {
  return (size_t)(padded(rows, 2) * (d * 8 + (int64_t)sizeof(Lanes)) + d * kLanes * 8 + 4 * 64);
}

template <class C>
VQK_INLINE void transpose(const Codes& codes, int64_t first, double* out) {
  const int64_t d = codes.features;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t j = first + lane;
    const bool usable = j < codes.count && codes.finite[j];
    const C* const c = (const C*)codes.rows + (usable ? j : 0) * d;
    // a NaN never compares as smaller
    for (int64_t k = 0; k < d; ++k) out[k * kLanes + lane] = usable ? (double)c[k] : __builtin_nan("");
  }
}

VQK_INLINE void keep(Lanes& lanes, d8 sq_dist, int64_t first) {
  const i8 index = i8{0, 1, 2, 3, 4, 5, 6, 7} + first;
  const i8 better = sq_dist < lanes.sq_dist;
  lanes.index = better ? index : lanes.index;
  lanes.sq_dist = better ? sq_dist : lanes.sq_dist;
}

void rescore(const Search& s, const int64_t* rows, int64_t count, void* scratch) {
  const int64_t d = s.x.features, even = padded(count, 2);
  char* at = (char*)scratch;
  double* const c = (double*)take(at, d * kLanes * 8);
  Lanes* const lanes = (Lanes*)take(at, even * (int64_t)sizeof(Lanes));
  double* const x = (double*)take(at, even * d * 8);
  for (int64_t r = 0; r < even; ++r) {
    load(s.x, rows[r < count ? r : 0], 1, x + r * d, d);
    lanes[r] = {d8{} + kInf, i8{} + INT64_MAX};
  }
  for (int64_t first = 0; first < s.codes.count; first += kLanes) {
    if (s.codes.wide)
      transpose<double>(s.codes, first, c);
    else
      transpose<float>(s.codes, first, c);
    for (int64_t r = 0; r < even; r += 2) {
      const double *const x0 = x + r * d, *const x1 = x0 + d;
      d8 a00 = {}, a01 = {}, a10 = {}, a11 = {};
      for (int64_t k = 0; k < d; ++k) {
        const d8 c0 = *(const d8*)(c + k * kLanes), c1 = *(const d8*)(c + k * kLanes + 8);
        const d8 t00 = x0[k] - c0, t01 = x0[k] - c1, t10 = x1[k] - c0, t11 = x1[k] - c1;
        a00 += t00 * t00;
        a01 += t01 * t01;
        a10 += t10 * t10;
        a11 += t11 * t11;
      }
      keep(lanes[r], a00, first);
      keep(lanes[r], a01, first + 8);
      keep(lanes[r + 1], a10, first);
      keep(lanes[r + 1], a11, first + 8);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    // where every distance overflows to inf, the lowest finite code has the least of them
    Best best = {kInf, s.codes.first_finite};
    for (int q = 0; q < 8; ++q)
      if (lanes[r].sq_dist[q] < kInf) improve(best, lanes[r].sq_dist[q], lanes[r].index[q]);
    answer(s, rows[r], best.index, best.sq_dist);
  }
}

}  // namespace

namespace VQK_ISA {
extern const NearestCodeKernels nearest_code;
const NearestCodeKernels nearest_code = {kPanel,         kTile,  points,          survey, pack,
                                         search_scratch, search, rescore_scratch, rescore};
}  // namespace VQK_ISA

}  // namespace vqk
