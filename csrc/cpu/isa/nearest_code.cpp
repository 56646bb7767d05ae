// The certified search of one block of rows, and the float64 search of rows that it leaves open.
#include "pack_codes.h"
#include "pack_rows.h"
#include "scratch.h"
#include "settle.h"

namespace vqk {
namespace {

// memory of a block
struct Block {
  char* raw;               // (rows, ld): x, float32 or float64
  vint* x;                 // (tiles, pairs, 2)
  Slot* slots;             // (tiles, kSlots)
  vint *shifts, *margins;  // (tiles, 2)
  vfloat* lengths;         // (tiles, 2): |P x'|, rounded up
  char* lanes;             // (ld) vectors
};

bool raw_wide(const Search& s) { return s.x.type == Type::f64; }
// float32 arithmetic serves rows that need no centre and scales that it can hold
bool arithmetic_wide(const Search& s) {
  return raw_wide(s) || s.codes.centred || !(s.codes.row_scale > 0x1p-100 && s.codes.row_scale < 0x1p100);
}

size_t divide(const Search& s, int64_t rows, void* scratch, Block* b) {
  const int64_t d = s.x.features, ld = padded(d, 16), tiles = (rows + kRows - 1) / kRows;
  char* at = (char*)scratch;
  b->raw = take(at, tiles * kRows * ld * (raw_wide(s) ? 8 : 4));
  b->x = (vint*)take(at, tiles * ((d + 1) / 2) * 2 * (int64_t)sizeof(vint));
  b->slots = (Slot*)take(at, tiles * kSlots * (int64_t)sizeof(Slot));
  b->shifts = (vint*)take(at, tiles * 2 * (int64_t)sizeof(vint));
  b->margins = (vint*)take(at, tiles * 2 * (int64_t)sizeof(vint));
  b->lengths = (vfloat*)take(at, tiles * 2 * (int64_t)sizeof(vfloat));
  b->lanes = take(at, ld * (int64_t)(arithmetic_wide(s) ? sizeof(vdouble) : sizeof(vfloat)));
  return (size_t)(at - (char*)scratch);
}

size_t search_scratch(const Search& s, int64_t rows) {
  Block b;
  return divide(s, rows, nullptr, &b);
}

template <class X, class V>
void pack_block(const Search& s, const Bounds& bounds, const Block& b, int64_t begin, int64_t rows) {
  const int64_t d = s.x.features, ld = padded(d, 16), pairs = (d + 1) / 2;
  X* const raw = (X*)b.raw;
  if (ld > d || rows % kRows) memset(raw, 0, (size_t)(padded(rows, kRows) * ld) * sizeof(X));
  load(s.x, begin, rows, raw, ld);
  for (int64_t v = 0; v * kWidth < padded(rows, kRows); ++v)
    pack_rows<V>(s.codes, bounds, raw + v * kWidth * ld, ld, (V*)b.lanes, b.x + v / 2 * pairs * 2 + v % 2,
                 b.shifts + v, b.margins + v, b.lengths + v);
}

template <class X>
int64_t settle_block(const Search& s, const Bounds& bounds, const Block& b, int64_t begin, int64_t rows) {
  const int64_t ld = padded(s.x.features, 16), pairs = (s.x.features + 1) / 2;
  int64_t open = 0;
  for (int64_t t = 0; t * kRows < rows; ++t) {
    const Tile<X> tile = {(const X*)b.raw + t * kRows * ld,
                          ld,
                          begin + t * kRows,
                          smaller(kRows, rows - t * kRows),
                          b.x + t * pairs * 2,
                          b.shifts + 2 * t,
                          b.margins + 2 * t,
                          b.lengths + 2 * t,
                          b.slots + t * kSlots};
    open += s.codes.wide ? settle<X, double>(s, bounds, tile) : settle<X, float>(s, bounds, tile);
  }
  return open;
}

// codes of some tiles against the block, a chunk of them at a time, into slots of their own
void scores(const Search& s, int64_t rows, void* scratch, int64_t tile_begin, int64_t tile_end, void* into) {
  Block b;
  divide(s, rows, scratch, &b);
  Slot* const slots = into ? (Slot*)into : b.slots;
  const Bounds bounds = bounds_of(s.codes, arithmetic_wide(s));
  const int64_t pairs = (s.x.features + 1) / 2, row_tiles = (rows + kRows - 1) / kRows;
  const vint least = all(INT32_MIN);
  for (int64_t q = 0; q < row_tiles * kSlots; ++q) slots[q] = {{least, least}, {least, least}};
  for (int64_t first = tile_begin; first < tile_end; first += s.chunk) {
    const int64_t last = smaller(tile_end, first + s.chunk);
    for (int64_t t = 0; t < row_tiles; ++t)
      for (int64_t c = first; c < last; ++c)
        fold(b.x + t * pairs * 2, b.shifts + 2 * t, s.codes.packed + c * pairs * kCodes,
             s.codes.half_norms + c * kCodes, pairs, s.codes.absent[c], (int32_t)(c / kSlots * kGroups),
             bounds.keep, slots + t * kSlots + c % kSlots);
  }
}

void pack_block(const Search& s, int64_t begin, int64_t end, void* scratch) {
  Block b;
  divide(s, end - begin, scratch, &b);
  const Bounds bounds = bounds_of(s.codes, arithmetic_wide(s));
  if (raw_wide(s))
    pack_block<double, vdouble>(s, bounds, b, begin, end - begin);
  else if (arithmetic_wide(s))
    pack_block<float, vdouble>(s, bounds, b, begin, end - begin);
  else
    pack_block<float, vfloat>(s, bounds, b, begin, end - begin);
}

int64_t settle_block(const Search& s, int64_t begin, int64_t end, void* scratch, const void* slots,
                     int64_t parts) {
  Block b;
  divide(s, end - begin, scratch, &b);
  const int64_t count = (end - begin + kRows - 1) / kRows * kSlots;
  for (int64_t part = 0; part < parts; ++part) {
    const Slot* const from = (const Slot*)slots + part * count;
    for (int64_t q = 0; q < count; ++q) b.slots[q] = part == 0 ? from[q] : joined(b.slots[q], from[q]);
  }
  const Bounds bounds = bounds_of(s.codes, arithmetic_wide(s));
  return raw_wide(s) ? settle_block<double>(s, bounds, b, begin, end - begin)
                     : settle_block<float>(s, bounds, b, begin, end - begin);
}

size_t slots_size(int64_t rows) { return (size_t)((rows + kRows - 1) / kRows * kSlots) * sizeof(Slot); }

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
VQK_INLINE void spread_codes(const Codes& codes, int64_t first, double* out) {
  const int64_t d = codes.features;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t j = first + lane;
    const bool usable = j < codes.count && codes.kinds[j] != kNever;
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
      spread_codes<double>(s.codes, first, c);
    else
      spread_codes<float>(s.codes, first, c);
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
const NearestCodeKernels nearest_code = {kCodes,       kRows,           points,     survey,     scale,
                                         pack,         search_scratch,  slots_size, pack_block, scores,
                                         settle_block, rescore_scratch, rescore};
}  // namespace VQK_ISA

}  // namespace vqk
