// The directional family, forward and backward (METHODS: z = x + sum_m w_m r_m u_m), one pass over rows each.
// Some rows at a time: their noise, then the sums behind every length, then all lengths at once, then the
// rows again, which are still in the first cache.
#include "../kernels.h"
#include "convert.h"
#include "row_buffers.h"
#include "units.h"

namespace vqk {
namespace {

enum Direction { kNoisy, kDetach, kRandom };

// noise of rows at the stride of the other buffers, 0 past the features
VQK_INLINE void draw(const Directional& a, int64_t row, int64_t rows, int m, float* v) {
  const int64_t d = a.x.features, ld = padded(d), blocks = (d + 3) / 4, width = 4 * blocks;
  noise(a.seed, (uint64_t)(row + a.row_offset), (uint32_t)m, rows, blocks, v);
  if (width == ld && d == ld) return;
  for (int64_t r = rows - 1; r >= 0; --r) {
    memmove(v + r * ld, v + r * width, (size_t)d * sizeof(float));
    for (int64_t k = d; k < ld; ++k) v[r * ld + k] = 0;
  }
}

// |e|^2, |u|^2 and g . u
struct Lengths {
  double ee, uu, gu;
};

template <Direction direction, class A>
VQK_INLINE Unit<A> along(const Unit<A>& e, const float* v, const Unit<A>& scale) {
  if constexpr (direction == kDetach) return e;
  Unit<A> noise;
  if constexpr (sizeof(A) == sizeof(float)) {
    noise = fetch(v);
  } else {
    A wide[kUnit<A>];
    for (int64_t l = 0; l < kUnit<A>; ++l) wide[l] = (A)v[l];
    noise = fetch(wide);
  }
  return direction == kRandom ? noise : scale * noise + e;
}

// float32 sums run over at most this many units before they go on in float64, so their error stays that of a
// few roundings
constexpr int64_t kRun = 8;

// the sums of one row and one point, in the precision of A but for long rows; also u where the forward pass
// wants it. False where A is float32 and its range may not have held them.
template <class A, Direction direction, bool backward>
VQK_INLINE bool measure(const A* x, const A* c, const float* v, const A* g, int64_t ld, A noise_std, A* u_out,
                        Lengths* out) {
  constexpr int64_t unit = kUnit<A>;
  Unit<double> ee8 = all(0.0), uu8 = ee8, gu8 = ee8, gg8 = ee8;
  const Unit<A> scale = all(noise_std);
  for (int64_t begin = 0; begin < ld; begin += kRun * unit) {
    const int64_t end = smaller(ld, begin + kRun * unit);
    Unit<A> ee = all((A)0), uu = ee, gu = ee, gg = ee;
    for (int64_t k = begin; k < end; k += unit) {
      const Unit<A> e = fetch(c + k) - fetch(x + k), u = along<direction>(e, v + k, scale);
      ee = ee + e * e;
      if (direction != kDetach) uu = uu + u * u;
      if (backward) {
        const Unit<A> upstream = fetch(g + k);
        gu = gu + upstream * u;
        gg = gg + upstream * upstream;
      } else {
        put(u, u_out + k);
      }
    }
    flush(ee, ee8);
    if (direction != kDetach) flush(uu, uu8);
    if (backward) flush(gu, gu8), flush(gg, gg8);
  }
  out->ee = total(ee8);
  out->uu = direction == kDetach ? out->ee : total(uu8);
  out->gu = backward ? total(gu8) : 0;
  if constexpr (sizeof(A) == sizeof(double)) return true;
  // what fell below the range is nothing beside such sums; written so that a NaN is out of range
  constexpr double low = 0x1p-80, high = 0x1p120;
  bool held = out->ee >= low && out->ee <= high && out->uu >= low && out->uu <= high;
  if (backward) {
    const double gg = total(gg8);
    held = held && __builtin_fabs(out->gu) <= high && gg <= high && gg * out->uu >= 0x1p-180;
  }
  return held;
}

// the direction of one feature before it is normalised, in float64 from float32
template <Direction direction>
VQK_INLINE double along_wide(double e, const float* v, double noise_std) {
  return direction == kDetach ? e : direction == kRandom ? (double)*v : noise_std * (double)*v + e;
}

// the same sums of float32 rows in float64 throughout: c - x may be out of the range of float32
template <Direction direction, bool backward>
void measure_wide(const float* x, const float* c, const float* v, const float* g, int64_t ld,
                  double noise_std, Lengths* out) {
  alignas(64) double ee[8] = {}, uu[8] = {}, gu[8] = {};
  for (int64_t k = 0; k < ld; k += 8)
    for (int64_t l = 0; l < 8; ++l) {
      const double e = (double)c[k + l] - (double)x[k + l];
      const double u = along_wide<direction>(e, v + k + l, noise_std);
      ee[l] += e * e;
      uu[l] += u * u;
      if (backward) gu[l] += (double)g[k + l] * u;
    }
  *out = {total(ee), total(uu), total(gu)};
}

// whether factor * float32 keeps the digits of the factor
VQK_INLINE bool fits(double factor) {
  const double size = __builtin_fabs(factor);
  return factor == 0 || (size >= 0x1p-100 && size <= 0x1p100);
}

// out = base + factor * (to - from), or factor * to where `from` is null
template <class A, bool kDifference>
VQK_INLINE void move(const A* base, double factor, const A* to, const A* from, int64_t ld, A* out) {
  if (sizeof(A) == sizeof(double) || fits(factor)) {
    const Unit<A> by = all((A)factor);
    for (int64_t k = 0; k < ld; k += kUnit<A>) {
      const Unit<A> step = kDifference ? fetch(to + k) - fetch(from + k) : fetch(to + k);
      put(fetch(base + k) + by * step, out + k);
    }
    return;
  }
  for (int64_t k = 0; k < ld; ++k) {
    const double step = kDifference ? (double)to[k] - (double)from[k] : (double)to[k];
    out[k] = (A)((double)base[k] + factor * step);
  }
}

template <class A>
VQK_INLINE void fill(A* row, int64_t n, A v) {
  for (int64_t k = 0; k < n; ++k) row[k] = v;
}

// what is known of kRows rows
struct Block {
  int64_t code[kRows];  // -1: no such code
  double weight[2][kRows];
  double factor[2][kRows];  // of u in the forward pass, of e in the backward
  double ee[2][kRows], uu[2][kRows], gu[2][kRows];
  const void* point[2][kRows];
  bool vast[kRows];  // finite, but its sums are not in float32: its differences may not be either
};

VQK_INLINE void read_codes(const Directional& a, int64_t first, int64_t rows, int points, Block& b) {
  int64_t outer = first / a.indices.inner, m = first % a.indices.inner;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t code =
        ((const int64_t*)a.indices.data)[outer * a.indices.stride_batch + m * a.indices.stride_inner];
    b.code[r] = code >= 0 && code <= a.codebook.inner - points ? code : -1;
    if (++m == a.indices.inner) m = 0, ++outer;
  }
  fill(b.weight[0], kRows, 1.0);
  if (points == 2) {
    load(a.position, first, rows, b.weight[1], 1);
    for (int64_t r = 0; r < rows; ++r) b.weight[0][r] = 1 - b.weight[1][r];
  }
}

// points of all rows, as they are in the codebook or in the buffers
template <class A>
VQK_INLINE void read_points(const Directional& a, int64_t rows, int points, const Buffers<A>& buffer,
                            Block& b) {
  const int64_t d = a.x.features, ld = padded(d);
  const bool direct = is<A>(a.codebook.type) && a.codebook.stride_feature == 1 && d % kUnit<A> == 0;
  for (int m = 0; m < points; ++m)
    for (int64_t r = 0; r < rows; ++r) {
      if (b.code[r] < 0) continue;
      if (direct) {
        b.point[m][r] = (const A*)a.codebook.data + (b.code[r] + m) * a.codebook.stride_inner;
        continue;
      }
      A* const c = buffer.c[m] + r * ld;
      load(a.codebook, b.code[r] + m, 1, c, d);
      pad(c, 1, d, ld);
      b.point[m][r] = c;
    }
}

// lengths in, factors out; whole vectors of rows
template <bool backward>
VQK_INLINE void find_factors(int points, Block& b) {
  for (int m = 0; m < points; ++m)
    for (int64_t r = 0; r < kRows; ++r) {
      const double length = __builtin_sqrt(b.ee[m][r]), norm = __builtin_sqrt(b.uu[m][r]);
      if (backward) {
        const double along = b.uu[m][r] > 0 ? b.gu[m][r] / norm : 0;
        b.factor[m][r] = b.ee[m][r] > 0 ? b.weight[m][r] * along / length : 0;
      } else {
        b.factor[m][r] = b.uu[m][r] > 0 ? b.weight[m][r] * length / norm : 0 * length;
      }
    }
}

// the whole move of a vast row, in float64
template <Direction direction, bool backward>
void move_wide(const Block& b, int points, int64_t r, const float* x, const float* const* v, const float* g,
               int64_t d, double noise_std, float* out) {
  for (int64_t k = 0; k < d; ++k) {
    double moved = backward ? (double)g[k] : (double)x[k];
    for (int m = 0; m < points; ++m) {
      if (backward && !(b.ee[m][r] > 0)) continue;
      const double e = (double)((const float*)b.point[m][r])[k] - (double)x[k];
      moved +=
          backward ? -b.factor[m][r] * e : b.factor[m][r] * along_wide<direction>(e, v[m] + k, noise_std);
    }
    out[k] = (float)moved;
  }
}

template <class A, Direction direction, bool backward>
void rows_of(const Directional& a, const Buffers<A>& buffer, int64_t first, int64_t rows, const A* x,
             int64_t x_stride, const A* g, int64_t g_stride, A* z, int64_t z_stride) {
  const int64_t d = a.x.features, ld = padded(d), width = d % kUnit<A> == 0 ? d : ld, count = a.x.count();
  const int points = a.position.data ? 2 : 1;
  Block b;
  read_codes(a, first, rows, points, b);
  read_points(a, rows, points, buffer, b);
  const A noise_std = (A)a.noise_std;
  bool whole[kRows];
  for (int64_t r = 0; r < rows; ++r) whole[r] = true, b.vast[r] = false;
  if (direction == kDetach && !backward) {
    for (int64_t r = 0; r < rows; ++r) whole[r] = b.code[r] < 0 || finite(x + r * x_stride, d);
  } else {
    for (int m = 0; m < points; ++m) {
      if (direction != kDetach) draw(a, first, rows, m, buffer.v[m]);
      for (int64_t r = 0; r < kRows; ++r) {
        b.ee[m][r] = b.uu[m][r] = b.gu[m][r] = 0;
        if (r >= rows || b.code[r] < 0) continue;
        const A *const xr = x + r * x_stride, *const c = (const A*)b.point[m][r],
                       *const gr = g + r * g_stride;
        const float* const v = buffer.v[m] + r * ld;
        Lengths s;
        const bool held =
            measure<A, direction, backward>(xr, c, v, gr, width, noise_std, buffer.u[m] + r * ld, &s);
        if constexpr (sizeof(A) == sizeof(float))
          if (!held) {
            const double narrow[2] = {s.ee, s.uu};
            measure_wide<direction, backward>(xr, c, v, gr, width, a.noise_std, &s);
            if (!finite(narrow, 2) && finite(&s.ee, 2)) b.vast[r] = true;
          }
        b.ee[m][r] = s.ee, b.uu[m][r] = s.uu, b.gu[m][r] = s.gu;
        // a sum that is finite had no other terms
        if (!finite(&s.ee, 1)) whole[r] = finite(xr, d);
      }
    }
    find_factors<backward>(points, b);
  }
  for (int64_t r = 0; r < rows; ++r) {
    A* const out = z + r * z_stride;
    const bool alive = b.code[r] >= 0 && whole[r];
    if (backward)
      for (int m = 0; m < points; ++m) {
        const int64_t entry = m * count + first + r;
        a.codes[entry] = alive && b.ee[m][r] > 0 ? b.code[r] + m : -1;
        a.pull[entry] = b.factor[m][r];
      }
    if (!alive) {
      fill(out, d, b.code[r] < 0 ? (A)0 : (A)__builtin_nan(""));
    } else if (direction == kDetach && !backward) {
      // the point itself, to the last bit
      const A *const c0 = (const A*)b.point[0][r], *const c1 = (const A*)b.point[1][r];
      if (points == 1)
        memcpy(out, c0, (size_t)d * sizeof(A));
      else
        for (int64_t k = 0; k < d; ++k)
          out[k] = (A)(b.weight[0][r] * (double)c0[k] + b.weight[1][r] * (double)c1[k]);
    } else if (b.vast[r]) {
      if constexpr (sizeof(A) == sizeof(float)) {
        const float* const v[2] = {buffer.v[0] + r * ld, buffer.v[1] + r * ld};
        move_wide<direction, backward>(b, points, r, x + r * x_stride, v, g + r * g_stride, d, a.noise_std,
                                       out);
      }
    } else {
      const A *from = (backward ? g + r * g_stride : x + r * x_stride), *const xr = x + r * x_stride;
      bool moved = false;
      for (int m = 0; m < points; ++m, moved = true) {
        // 0 times an inf would be a NaN where the term is none
        if (backward && !(b.ee[m][r] > 0)) {
          if (!moved && from != out) memcpy(out, from, (size_t)width * sizeof(A));
        } else if (backward) {
          move<A, true>(from, -b.factor[m][r], (const A*)b.point[m][r], xr, width, out);
        } else {
          move<A, false>(from, b.factor[m][r], buffer.u[m] + r * ld, nullptr, width, out);
        }
        from = out;
      }
    }
  }
}

template <class A, Direction direction, bool backward>
void run(const Directional& a, int64_t begin, int64_t end, void* scratch) {
  const int64_t d = a.x.features, ld = padded(d), at_once = copied(d);
  const Buffers<A> b = buffers<A>(scratch, d);
  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t rows = smaller(at_once, end - first);
    const View<A> x = view(a.x, first, rows, b.x), z = view(a.z, first, rows, b.z),
                  g = backward ? view(a.grad, first, rows, b.g) : x;
    if (x.copy) load(a.x, first, rows, b.x, ld), pad(b.x, rows, d, ld);
    if (backward && g.copy) load(a.grad, first, rows, b.g, ld), pad(b.g, rows, d, ld);
    for (int64_t r = 0; r < rows; r += kRows)
      rows_of<A, direction, backward>(a, b, first + r, smaller(kRows, rows - r), x.at + r * x.stride,
                                      x.stride, g.at + r * g.stride, g.stride, z.at + r * z.stride, z.stride);
    if (z.copy) store(b.z, ld, a.z, first, rows);
  }
}

template <bool backward>
void choose(const Directional& a, int64_t begin, int64_t end, void* scratch) {
  switch ((Direction)a.direction) {
    case kNoisy:
      return a.wide ? run<double, kNoisy, backward>(a, begin, end, scratch)
                    : run<float, kNoisy, backward>(a, begin, end, scratch);
    case kDetach:
      return a.wide ? run<double, kDetach, backward>(a, begin, end, scratch)
                    : run<float, kDetach, backward>(a, begin, end, scratch);
    case kRandom:
      return a.wide ? run<double, kRandom, backward>(a, begin, end, scratch)
                    : run<float, kRandom, backward>(a, begin, end, scratch);
  }
}

void forward(const Directional& a, int64_t begin, int64_t end, void* scratch) {
  choose<false>(a, begin, end, scratch);
}

void backward(const Directional& a, int64_t begin, int64_t end, void* scratch) {
  choose<true>(a, begin, end, scratch);
}

}  // namespace

namespace VQK_ISA {
extern const DirectionalKernels directional;
const DirectionalKernels directional = {scratch_of, forward, backward};
}  // namespace VQK_ISA

}  // namespace vqk
