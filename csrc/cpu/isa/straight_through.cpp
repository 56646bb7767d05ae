// The code in place of each row, and back, one pass over rows each: z = c, |x - c|^2, and
// dL/dx = T g + by (x - c), where T is the identity or rho R^T of the rotation that takes x to c = rho R x.
#include "../kernels.h"
#include "convert.h"
#include "row_buffers.h"
#include "units.h"

namespace vqk {
namespace {

// float32 sums run over at most this many units before they go on in float64
constexpr int64_t kRun = 8;

// |x/|x| + c/|c||^2: below the first they are antiparallel, below the second float32 loses too many digits
constexpr double kOpposite = 0x1p-36, kNarrow = 0.5;

// float32 factors in this range keep their digits beside what they multiply
VQK_INLINE bool fits(double factor) {
  const double size = __builtin_fabs(factor);
  return factor == 0 || (size >= 0x1p-100 && size <= 0x1p100);
}

template <class A>
VQK_INLINE void fill(A* row, int64_t n, A v) {
  for (int64_t k = 0; k < n; ++k) row[k] = v;
}

// codes of some rows, as they are in the codebook or in the buffer; -1 and null for a row that is masked
template <class A>
struct Chosen {
  int64_t code[kRows];
  const A* point[kRows];
};

template <class A>
VQK_INLINE void choose(const StraightThrough& a, int64_t first, int64_t rows, A* copies, Chosen<A>& to) {
  const int64_t d = a.x.features, ld = padded(d);
  const bool direct = is<A>(a.codebook.type) && a.codebook.stride_feature == 1 && d % kUnit<A> == 0;
  int64_t outer = first / a.indices.inner, m = first % a.indices.inner;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t code =
        ((const int64_t*)a.indices.data)[outer * a.indices.stride_batch + m * a.indices.stride_inner];
    if (++m == a.indices.inner) m = 0, ++outer;
    to.code[r] = code >= 0 && code < a.codebook.inner ? code : -1;
    to.point[r] = nullptr;
    if (to.code[r] < 0) continue;
    if (direct) {
      to.point[r] = (const A*)a.codebook.data + code * a.codebook.stride_inner;
      continue;
    }
    A* const c = copies + r * ld;
    load(a.codebook, code, 1, c, d);
    pad(c, 1, d, ld);
    to.point[r] = c;
  }
}

// |x - c|^2 in float64, whatever the rows are
template <class A>
double sq_dist_wide(const A* x, const A* c, int64_t d) {
  double sum = 0;
  for (int64_t k = 0; k < d; ++k) {
    const double e = (double)c[k] - (double)x[k];
    sum += e * e;
  }
  return sum;
}

// z = c and |x - c|^2
template <class A>
VQK_INLINE double put_code(const A* x, const A* c, int64_t width, A* z) {
  constexpr int64_t unit = kUnit<A>;
  Unit<double> sums = all(0.0);
  for (int64_t begin = 0; begin < width; begin += kRun * unit) {
    const int64_t end = smaller(width, begin + kRun * unit);
    Unit<A> sum = all((A)0);
    for (int64_t k = begin; k < end; k += unit) {
      const Unit<A> code = fetch(c + k), e = code - fetch(x + k);
      sum = sum + e * e;
      put(code, z + k);
    }
    flush(sum, sums);
  }
  return total(sums);
}

template <class A>
void forward_of(const StraightThrough& a, int64_t begin, int64_t end, void* scratch) {
  const int64_t d = a.x.features, ld = padded(d), width = d % kUnit<A> == 0 ? d : ld, at_once = copied(d);
  const Buffers<A> b = buffers<A>(scratch, d);
  double sum = 0, counted = 0;
  Chosen<A> chosen;
  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t rows = smaller(at_once, end - first);
    const View<A> x = view(a.x, first, rows, b.x), z = view(a.z, first, rows, b.z);
    if (x.copy) load(a.x, first, rows, b.x, ld), pad(b.x, rows, d, ld);
    for (int64_t from = 0; from < rows; from += kRows) {
      const int64_t n = smaller(kRows, rows - from);
      choose(a, first + from, n, b.c[0], chosen);
      for (int64_t r = 0; r < n; ++r) {
        const A* const xr = x.at + (from + r) * x.stride;
        A* const out = z.at + (from + r) * z.stride;
        double square = 0;
        if (chosen.code[r] < 0) {
          fill(out, d, (A)0);
        } else {
          square = put_code(xr, chosen.point[r], width, out);
          // a sum that is finite had no other terms; one that is not may have left the range of float32
          bool good = true;
          if (!finite(&square, 1) && (good = finite(xr, d))) square = sq_dist_wide(xr, chosen.point[r], d);
          if (good)
            sum += square, ++counted;
          else
            fill(out, d, (A)__builtin_nan("")), square = __builtin_nan("");
        }
        const int64_t row = first + from + r;
        if (a.wide)
          ((double*)a.sq_dist)[row] = square;
        else
          ((float*)a.sq_dist)[row] = (float)square;
      }
    }
    if (z.copy) store(b.z, ld, a.z, first, rows);
  }
  double* const totals = a.totals + 2 * (begin / kTotals);
  totals[0] = sum, totals[1] = counted;
}

// out = g + by (x - c); false where that is not finite, and float32 may be why
template <class A>
VQK_INLINE bool pass(const A* g, const A* x, const A* c, A by, int64_t width, A* out) {
  const Unit<A> factor = all(by), nothing = all((A)0);
  Unit<A> lost = nothing;
  for (int64_t k = 0; k < width; k += kUnit<A>) {
    const Unit<A> moved = fetch(g + k) + factor * (fetch(x + k) - fetch(c + k));
    lost = lost + nothing * moved;
    put(moved, out + k);
  }
  Unit<double> sums = all(0.0);
  flush(lost, sums);
  return total(sums) == 0;
}

struct Dots {
  double xx, cc, xc, gx, gc;
};

// false where A is float32 and its range may not have held them
template <class A>
VQK_INLINE bool measure(const A* g, const A* x, const A* c, int64_t width, Dots* out) {
  constexpr int64_t unit = kUnit<A>;
  Unit<double> xx8 = all(0.0), cc8 = xx8, xc8 = xx8, gx8 = xx8, gc8 = xx8, gg8 = xx8;
  for (int64_t begin = 0; begin < width; begin += kRun * unit) {
    const int64_t end = smaller(width, begin + kRun * unit);
    Unit<A> xx = all((A)0), cc = xx, xc = xx, gx = xx, gc = xx, gg = xx;
    for (int64_t k = begin; k < end; k += unit) {
      const Unit<A> xk = fetch(x + k), ck = fetch(c + k), gk = fetch(g + k);
      xx = xx + xk * xk, cc = cc + ck * ck, xc = xc + xk * ck;
      gx = gx + gk * xk, gc = gc + gk * ck, gg = gg + gk * gk;
    }
    flush(xx, xx8), flush(cc, cc8), flush(xc, xc8), flush(gx, gx8), flush(gc, gc8), flush(gg, gg8);
  }
  *out = {total(xx8), total(cc8), total(xc8), total(gx8), total(gc8)};
  const double gg = total(gg8);
  // what fell below the range is nothing beside such sums; written so that a NaN is out of range
  constexpr double low = 0x1p-80, high = 0x1p120;
  return out->xx >= low && out->xx <= high && out->cc >= low && out->cc <= high && gg <= high &&
         gg * out->xx >= 0x1p-180 && gg * out->cc >= 0x1p-180;
}

// out = a g + b x + c_by c + by (x - c)
struct Factors {
  double g, x, c, by;
};

template <class A>
VQK_INLINE bool combine(const Factors& f, const A* g, const A* x, const A* c, int64_t width, A* out) {
  const Unit<A> fg = all((A)f.g), fx = all((A)f.x), fc = all((A)f.c), by = all((A)f.by), nothing = all((A)0);
  Unit<A> lost = nothing;
  for (int64_t k = 0; k < width; k += kUnit<A>) {
    const Unit<A> xk = fetch(x + k), ck = fetch(c + k);
    const Unit<A> moved = fg * fetch(g + k) + (fx * xk + fc * ck) + by * (xk - ck);
    lost = lost + nothing * moved;
    put(moved, out + k);
  }
  Unit<double> sums = all(0.0);
  flush(lost, sums);
  return total(sums) == 0;
}

// out = rho R^T g + by (x - c) where sums of float32 serve; false where they may not
template <class A>
VQK_INLINE bool turn(const A* g, const A* x, const A* c, double by, int64_t width, A* out) {
  Dots s;
  if (!measure(g, x, c, width, &s)) return false;
  const double nx = __builtin_sqrt(s.xx), nc = __builtin_sqrt(s.cc), rho = nc / nx;
  const double square = 2 + 2 * s.xc / (nx * nc);
  if (!(square >= kNarrow)) return false;
  const double across = 2 * (s.gx / nx + s.gc / nc) / square;
  const Factors f = {rho, rho * (2 * s.gc / nc - across) / nx, -rho * across / nc, by};
  if (!fits(f.g) || !fits(f.x) || !fits(f.c) || !fits(f.by)) return false;
  return combine(f, g, x, c, width, out);
}

// the same in float64, whatever the rows are
template <class A>
void turn_wide(const A* g, const A* x, const A* c, double by, bool rotation, int64_t d, A* out) {
  double xx = 0, cc = 0, gx = 0, gc = 0, square = 0, gs = 0;
  for (int64_t k = 0; rotation && k < d; ++k) {
    const double xk = (double)x[k], ck = (double)c[k], gk = (double)g[k];
    xx += xk * xk, cc += ck * ck, gx += gk * xk, gc += gk * ck;
  }
  const double nx = __builtin_sqrt(xx), nc = __builtin_sqrt(cc);
  const bool turned = xx > 0, none = turned && !(cc > 0) && !(cc != cc);
  const double rho = turned ? nc / nx : 1;
  if (turned && !none) {
    for (int64_t k = 0; k < d; ++k) {
      const double sk = (double)x[k] / nx + (double)c[k] / nc;
      square += sk * sk, gs += (double)g[k] * sk;
    }
  }
  const bool opposite = square <= kOpposite;
  for (int64_t k = 0; k < d; ++k) {
    const double xk = (double)x[k], ck = (double)c[k], gk = (double)g[k];
    double moved = gk;
    if (none)
      moved = 0;
    else if (turned && opposite)
      moved = rho * (gk - 2 * (gx / nx) * (xk / nx));
    else if (turned)
      moved = rho * (gk - 2 * (gs / square) * (xk / nx + ck / nc) + 2 * (gc / nc) * (xk / nx));
    out[k] = (A)(moved + by * (xk - ck));
  }
}

template <class A, bool rotation>
void backward_of(const StraightThrough& a, int64_t begin, int64_t end, void* scratch) {
  const int64_t d = a.x.features, ld = padded(d), width = d % kUnit<A> == 0 ? d : ld, at_once = copied(d);
  const Buffers<A> b = buffers<A>(scratch, d);
  const bool plain = fits(a.by);
  Chosen<A> chosen;
  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t rows = smaller(at_once, end - first);
    const View<A> x = view(a.x, first, rows, b.x), z = view(a.z, first, rows, b.z),
                  g = view(a.grad, first, rows, b.g);
    if (x.copy) load(a.x, first, rows, b.x, ld), pad(b.x, rows, d, ld);
    if (g.copy) load(a.grad, first, rows, b.g, ld), pad(b.g, rows, d, ld);
    for (int64_t from = 0; from < rows; from += kRows) {
      const int64_t n = smaller(kRows, rows - from);
      choose(a, first + from, n, b.c[0], chosen);
      for (int64_t r = 0; r < n; ++r) {
        const A *const xr = x.at + (from + r) * x.stride, *const gr = g.at + (from + r) * g.stride,
                       *const c = chosen.point[r];
        A* const out = z.at + (from + r) * z.stride;
        int64_t code = chosen.code[r];
        if (code < 0) {
          fill(out, d, (A)0);
        } else if (!(rotation ? turn(gr, xr, c, a.by, width, out)
                              : plain && pass(gr, xr, c, (A)a.by, width, out))) {
          if (finite(xr, d))
            turn_wide(gr, xr, c, a.by, rotation, d, out);
          else
            fill(out, d, (A)__builtin_nan("")), code = -1;
        }
        if (a.codes) a.codes[first + from + r] = code;
      }
    }
    if (z.copy) store(b.z, ld, a.z, first, rows);
  }
}

void forward(const StraightThrough& a, int64_t begin, int64_t end, void* scratch) {
  return a.wide ? forward_of<double>(a, begin, end, scratch) : forward_of<float>(a, begin, end, scratch);
}

void backward(const StraightThrough& a, int64_t begin, int64_t end, void* scratch) {
  if (a.rotation)
    return a.wide ? backward_of<double, true>(a, begin, end, scratch)
                  : backward_of<float, true>(a, begin, end, scratch);
  return a.wide ? backward_of<double, false>(a, begin, end, scratch)
                : backward_of<float, false>(a, begin, end, scratch);
}

void add(const double* first, double share, const double* second, const Rows& out, int64_t begin, int64_t end,
         void* scratch) {
  const int64_t d = out.features;
  double* const row = (double*)scratch;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t k = 0; k < d; ++k) row[k] = (first ? first[n * d + k] : 0) + share * second[n * d + k];
    store(row, d, out, n, 1);
  }
}

}  // namespace

namespace VQK_ISA {
extern const StraightThroughKernels straight_through;
const StraightThroughKernels straight_through = {scratch_of, forward, backward, add};
}  // namespace VQK_ISA

}  // namespace vqk
