// Sums of rows per code. Where rows are many beside codes, or lie across, such as those of NCHW, they are
// added as they come to a table of all codes, some features (a slab) at a time; else in the order of their
// codes, some entries (a chunk) at a time. Either way the order of every sum depends on the data alone and
// not on the threads.
#include "../kernels.h"
#include "convert.h"
#include "units.h"

namespace vqk {
namespace {

// float32 may not hold a difference of what it holds
template <class A>
VQK_INLINE doubles difference(const A* c, const A* x) {
  return widened(c) - widened(x);
}

// rows that are added at a time, and how far ahead of them rows are asked for
constexpr int64_t kBatch = 16, kAhead = 6;

size_t scratch_of(int64_t d) { return (size_t)((2 + kBatch) * (d + 8) * 8); }

template <class A>
VQK_INLINE bool lies_together(const Rows& rows) {
  return rows.type == (sizeof(A) == 4 ? Type::f32 : Type::f64) && rows.stride_feature == 1;
}

template <class A>
VQK_INLINE const A* place(const Rows& rows, int64_t n) {
  const A* const data = (const A*)rows.data;
  if (rows.batch == 1) return data + n * rows.stride_inner;
  return data + n / rows.inner * rows.stride_batch + n % rows.inner * rows.stride_inner;
}

VQK_INLINE int64_t row_of(int64_t entry, int64_t count) { return entry < count ? entry : entry - count; }

template <class A>
VQK_INLINE void prefetch(const A* row, int64_t d) {
  const int64_t bytes = smaller(d * (int64_t)sizeof(A), 1024);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)row + at);
}

// parts * kDoubles features of n rows
template <int parts, bool pulled, class A>
VQK_INLINE void add_tile(const A* const* rows, const double* pull, int64_t n, const A* c, int64_t k,
                         double* sums) {
  doubles acc[parts];
#pragma GCC unroll 8
  for (int i = 0; i < parts; ++i) acc[i] = *(const loose_doubles*)(sums + k + i * kDoubles);
  for (int64_t r = 0; r < n; ++r) {
    const A* const x = rows[r] + k;
#pragma GCC unroll 8
    for (int i = 0; i < parts; ++i)
      if constexpr (pulled)
        acc[i] += pull[r] * difference(c + k + i * kDoubles, x + i * kDoubles);
      else
        acc[i] += widened(x + i * kDoubles);
  }
#pragma GCC unroll 8
  for (int i = 0; i < parts; ++i) *(loose_doubles*)(sums + k + i * kDoubles) = acc[i];
}

template <bool pulled, class A>
VQK_INLINE void add_rows(const A* const* rows, const double* pull, int64_t n, const A* c, int64_t d,
                         double* sums) {
  int64_t k = 0;
  for (; k + 8 * kDoubles <= d; k += 8 * kDoubles) add_tile<8, pulled>(rows, pull, n, c, k, sums);
  for (; k + kDoubles <= d; k += kDoubles) add_tile<1, pulled>(rows, pull, n, c, k, sums);
  for (; k < d; ++k)
    for (int64_t r = 0; r < n; ++r)
      if constexpr (pulled)
        sums[k] += pull[r] * ((double)c[k] - (double)rows[r][k]);
      else
        sums[k] += (double)rows[r][k];
}

template <class A, bool pulled>
void sums_of(const Sums& args, int64_t chunk, void* scratch) {
  const int64_t d = args.x.features, count = args.x.count(), last = args.starts[args.codes];
  const int64_t begin = chunk * args.chunk, end = smaller(begin + args.chunk, last);
  double* const total = (double*)scratch;
  A* const code = (A*)(total + d);
  A* const copies = (A*)(total + 2 * d);
  const bool together = lies_together<A>(args.x), codes_together = pulled && lies_together<A>(args.codebook);
  const A* rows[kBatch];
  double pull[kBatch];
  // the code of the first entry: the last code that starts at or before it
  int64_t low = 0, high = args.codes;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (args.starts[middle] <= begin ? low : high) = middle;
  }
  for (int64_t at = begin, j = low; at < end; ++j) {
    const int64_t stop = smaller(args.starts[j + 1], end);
    if (stop <= at) continue;
    const int64_t from = at;
    memset(total, 0, (size_t)d * 8);
    const A* c = code;
    if (codes_together)
      c = place<A>(args.codebook, j);
    else if (pulled)
      load(args.codebook, j, 1, code, d);
    while (at < stop) {
      const int64_t n = smaller(kBatch, stop - at);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t entry = args.sorted[at + r], row = row_of(entry, count);
        if (together && at + r + kAhead < end)
          prefetch(place<A>(args.x, row_of(args.sorted[at + r + kAhead], count)), d);
        if (pulled) pull[r] = args.pull[entry];
        rows[r] = copies + r * d;
        if (together)
          rows[r] = place<A>(args.x, row);
        else
          load(args.x, row, 1, copies + r * d, d);
      }
      add_rows<pulled>(rows, pull, n, c, d, total);
      at += n;
    }
    // a code that goes on in another chunk is finished by whoever joins the edges
    if (from > args.starts[j])
      memcpy(args.edges + 2 * chunk * d, total, (size_t)d * 8);
    else if (stop < args.starts[j + 1])
      memcpy(args.edges + (2 * chunk + 1) * d, total, (size_t)d * 8);
    else
      store(total, d, args.out, j, 1);
  }
}

void sums(const Sums& args, int64_t chunk, void* scratch) {
  if (args.codebook.data)
    return args.wide ? sums_of<double, true>(args, chunk, scratch)
                     : sums_of<float, true>(args, chunk, scratch);
  return args.wide ? sums_of<double, false>(args, chunk, scratch)
                   : sums_of<float, false>(args, chunk, scratch);
}

void join(const Sums& args, int64_t begin, int64_t end, void* scratch) {
  const int64_t d = args.x.features;
  double* const total = (double*)scratch;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t from = args.starts[j], to = args.starts[j + 1];
    if (to == from) {
      memset(total, 0, (size_t)d * 8);
      store(total, d, args.out, j, 1);
      continue;
    }
    const int64_t first = from / args.chunk, final = (to - 1) / args.chunk;
    if (first == final) continue;
    memcpy(total, args.edges + (2 * first + 1) * d, (size_t)d * 8);
    for (int64_t chunk = first + 1; chunk <= final; ++chunk)
      for (int64_t k = 0; k < d; ++k) total[k] += args.edges[2 * chunk * d + k];
    store(total, d, args.out, j, 1);
  }
}

// features at a time of rows that lie across, and of rows that lie together: a cache line of theirs
constexpr int kSlab = 8, kLine = 16;

// rows that are turned at a time
constexpr int64_t kTurned = 128;

size_t columns_scratch_of(int64_t codes, bool across) {
  return (size_t)(2 * codes + (across ? kTurned : 0)) * (across ? kSlab : kLine) * 8;
}

VQK_INLINE Rows slab_of(Rows rows, int64_t feature, int64_t features) {
  rows.data += feature * rows.stride_feature * size_of(rows.type);
  rows.features = features;
  return rows;
}

template <int slab, bool pulled, class A>
VQK_INLINE void add_to(double* table, int64_t code, double pull, const A* c, const A* x) {
  doubles* const sum = (doubles*)(table + code * slab);
  const A* const of = c + code * slab;
#pragma GCC unroll 8
  for (int i = 0; i < slab / kDoubles; ++i)
    if constexpr (pulled)
      sum[i] += pull * difference(of + i * kDoubles, x + i * kDoubles);
    else
      sum[i] += widened(x + i * kDoubles);
}

template <int slab, class A, bool pulled>
void columns_of(const Sums& args, const Slab& at, void* scratch) {
  constexpr bool turned = slab == kSlab;
  const int64_t feature = at.feature, width = smaller(slab, args.x.features - feature),
                count = args.x.count(), begin = at.code_begin, codes = at.code_end - begin;
  double* const table = at.table ? at.table : (double*)scratch;
  A* const c = (A*)((double*)scratch + codes * slab);
  A* const turned_rows = (A*)((double*)scratch + 2 * codes * slab);
  const Rows rows = slab_of(args.x, feature, width);
  // copies, which what is added to the table cannot change
  const int64_t* const by_row = args.by_row;
  const double* const pulls = args.pull;
  const int64_t entries = args.entries, row_end = at.row_end;
  memset(table, 0, (size_t)codes * slab * 8);
  if (turned) memset(turned_rows, 0, (size_t)(kTurned * slab) * sizeof(A));
  if (pulled) {
    // what stands beside the last features is added as well, to nothing
    if (width < slab) memset(c, 0, (size_t)(codes * slab) * sizeof(A));
    load(slab_of(args.codebook, feature, width), begin, codes, c, slab);
  }
  for (int64_t first = at.row_begin; first < row_end; first += kTurned) {
    const int64_t n = smaller(kTurned, row_end - first);
    if (turned) load(rows, first, n, turned_rows, slab);
    for (int64_t r = 0; r < n; ++r) {
      const A* const x = turned ? turned_rows + r * slab : place<A>(rows, first + r);
      if (!turned) __builtin_prefetch(x + 32 * rows.stride_inner);
      for (int64_t entry = first + r; entry < entries; entry += count) {
        const int64_t code = by_row[entry] - begin;
        if (code >= 0 && code < codes) add_to<slab, pulled>(table, code, pulled ? pulls[entry] : 0, c, x);
      }
    }
  }
  if (!at.table) store(table, slab, slab_of(args.out, feature, width), begin, codes);
}

void add_tables(const Sums& args, const Slab& first, int64_t tables, int64_t apart) {
  const int64_t slab = first.across ? kSlab : kLine, width = smaller(slab, args.x.features - first.feature),
                begin = first.code_begin * slab, end = first.code_end * slab;
  double* const sums = first.table;
  for (int64_t table = 1; table < tables; ++table)
    for (int64_t k = begin; k < end; ++k) sums[k] += sums[table * apart + k];
  store(sums + begin, slab, slab_of(args.out, first.feature, width), first.code_begin,
        first.code_end - first.code_begin);
}

void copy(const Rows& x, int64_t begin, int64_t end, bool wide, void* out) {
  const int64_t d = x.features;
  if (wide)
    load(x, begin, end - begin, (double*)out + begin * d, d);
  else
    load(x, begin, end - begin, (float*)out + begin * d, d);
}

template <class A>
VQK_INLINE bool whole_lines(const Rows& rows) {
  return lies_together<A>(rows) && rows.features % kLine == 0;
}

// how many features columns() takes at a time, 0 where it cannot
int slab_of_rows(const Rows& x, bool wide, bool across) {
  if (across) return kSlab;
  return (wide ? whole_lines<double>(x) : whole_lines<float>(x)) ? kLine : 0;
}

template <int slab>
void columns_with(const Sums& args, const Slab& at, void* scratch) {
  if (args.codebook.data)
    return args.wide ? columns_of<slab, double, true>(args, at, scratch)
                     : columns_of<slab, float, true>(args, at, scratch);
  return args.wide ? columns_of<slab, double, false>(args, at, scratch)
                   : columns_of<slab, float, false>(args, at, scratch);
}

void columns(const Sums& args, const Slab& at, void* scratch) {
  return at.across ? columns_with<kSlab>(args, at, scratch) : columns_with<kLine>(args, at, scratch);
}

// magnitudes of float32 as integers are in order, and above infinity stands every NaN
void drop_across(const Rows& x, int64_t begin, int64_t n, int64_t* codes) {
  uint32_t most[kTurned];
  for (int64_t r = 0; r < n; ++r) most[r] = 0;
  across<const float>(x, begin, n, [&](const float* from, int64_t r, int64_t run) {
    for (int64_t k = 0; k < x.features; ++k)
      for (int64_t q = 0; q < run; ++q) {
        const uint32_t size = bits_of(from[k * x.stride_feature + q]) & 0x7fffffffu;
        most[r + q] = size > most[r + q] ? size : most[r + q];
      }
  });
  for (int64_t r = 0; r < n; ++r)
    if (most[r] >= 0x7f800000u) codes[begin + r] = -1;
}

template <class A>
void drop(const Rows& x, int64_t n, A* row, int64_t* codes) {
  const A* at = row;
  if (lies_together<A>(x))
    at = place<A>(x, n);
  else
    load(x, n, 1, row, x.features);
  if (!finite(at, x.features)) codes[n] = -1;
}

void drop_non_finite(const Rows& x, int64_t begin, int64_t end, void* scratch, int64_t* codes) {
  if (x.type == Type::f32 && lies_across(x)) {
    for (int64_t first = begin; first < end; first += kTurned)
      drop_across(x, first, smaller(kTurned, end - first), codes);
    return;
  }
  for (int64_t n = begin; n < end; ++n)
    if (x.type == Type::f64)
      drop(x, n, (double*)scratch, codes);
    else
      drop(x, n, (float*)scratch, codes);
}

}  // namespace

namespace VQK_ISA {
extern const CodeSumsKernels code_sums;
const CodeSumsKernels code_sums = {scratch_of,         drop_non_finite, sums,       join, slab_of_rows,
                                   columns_scratch_of, columns,         add_tables, copy};
}  // namespace VQK_ISA

}  // namespace vqk
