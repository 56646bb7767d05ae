// The directional family, forward and backward (METHODS: z = x + sum_m w_m r_m u_m). Differences are formed
// in float32 (float64 for float64 inputs), lengths and dot products in float64, so that 1e-30 squared
// survives.
#include "../kernels.h"
#include "convert.h"
#include "noise.h"
#include "simd.h"

namespace vqk {
namespace {

enum Direction { kNoisy, kDetach, kRandom };

constexpr int64_t kRows = 16;

VQK_INLINE int64_t padded(int64_t d) { return (d + kNoise - 1) / kNoise * kNoise; }
VQK_INLINE d8 load8(const float* p) { return __builtin_convertvector(*(const f8u*)p, d8); }
VQK_INLINE d8 load8(const double* p) { return *(const d8u*)p; }
VQK_INLINE void store8(d8 v, float* p) { *(f8u*)p = __builtin_convertvector(v, f8); }
VQK_INLINE void store8(d8 v, double* p) { *(d8u*)p = v; }

// buffers of one thread; rows are padded with zeros to a multiple of kNoise
template <class A>
struct Buffers {
  A *x, *z, *g;    // (kRows, ld)
  A *e[2], *u[2];  // (ld): p - x, and the direction before it is normalised
  float* v;        // (ld)
  int64_t ld;

  Buffers(void* scratch, int64_t d) : ld(padded(d)) {
    x = (A*)scratch;
    z = x + kRows * ld;
    g = z + kRows * ld;
    e[0] = g + kRows * ld;
    e[1] = e[0] + ld;
    u[0] = e[1] + ld;
    u[1] = u[0] + ld;
    v = (float*)(u[1] + ld);
  }
};

size_t scratch_of(int64_t d) { return (size_t)((3 * kRows + 5) * padded(d) * 8); }

template <class T>
VQK_INLINE T value(const Rows& rows, int64_t n) {
  return *((const T*)rows.data + n / rows.inner * rows.stride_batch + n % rows.inner * rows.stride_inner);
}

VQK_INLINE double weight_of(const Rows& position, int64_t n, int m) {
  if (!position.data) return 1;
  double at;
  load(position, n, 1, &at, 1);
  return m == 0 ? 1 - at : at;
}

template <class A>
VQK_INLINE double dot(const A* a, const A* b, int64_t ld) {
  d8 acc0 = {}, acc1 = {};
  for (int64_t k = 0; k < ld; k += 16) {
    acc0 += load8(a + k) * load8(b + k);
    acc1 += load8(a + k + 8) * load8(b + k + 8);
  }
  return sum(acc0 + acc1);
}

// e = c - x and the vector along u, for point m of a row; the code is left in `e` when detached
template <class A>
VQK_INLINE void point(const Directional& a, const Buffers<A>& b, const A* x, int64_t row, int64_t code,
                      int m) {
  const int64_t d = a.x.features;
  A *const e = b.e[m], *const u = b.u[m];
  load(a.codebook, code, 1, e, d);
  for (int64_t k = 0; k < d; ++k) e[k] -= x[k];
  for (int64_t k = d; k < b.ld; ++k) e[k] = 0;
  if (a.direction == kDetach) {
    memcpy(u, e, (size_t)b.ld * sizeof(A));
    return;
  }
  noise(a.seed, (uint64_t)(row + a.row_offset), (uint32_t)m, d, b.v);
  const A scale = (A)a.noise_std;
  if (a.direction == kNoisy)
    for (int64_t k = 0; k < d; ++k) u[k] = scale * (A)b.v[k] + e[k];
  else
    for (int64_t k = 0; k < d; ++k) u[k] = (A)b.v[k];
  for (int64_t k = d; k < b.ld; ++k) u[k] = 0;
}

// rows and codes of a block: 0 past the features, so that sums may run to the padding
template <class A>
VQK_INLINE void fetch(const Rows& rows, int64_t begin, int64_t n, A* out, int64_t ld) {
  load(rows, begin, n, out, ld);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t k = rows.features; k < ld; ++k) out[r * ld + k] = 0;
}

template <class A>
VQK_INLINE void fill(A* row, int64_t d, A v) {
  for (int64_t k = 0; k < d; ++k) row[k] = v;
}

template <class A>
void forward_row(const Directional& a, const Buffers<A>& b, const A* x, A* z, int64_t row, int64_t code) {
  const int64_t d = a.x.features, ld = b.ld;
  const int points = a.position.data ? 2 : 1;
  if (a.direction == kDetach) {
    // the point itself, to the last bit
    for (int m = 0; m < points; ++m) load(a.codebook, code + m, 1, b.e[m], d);
    if (points == 1) {
      memcpy(z, b.e[0], (size_t)d * sizeof(A));
      return;
    }
    const double w0 = weight_of(a.position, row, 0), w1 = weight_of(a.position, row, 1);
    for (int64_t k = 0; k < d; ++k) z[k] = (A)(w0 * (double)b.e[0][k] + w1 * (double)b.e[1][k]);
    return;
  }
  memcpy(z, x, (size_t)ld * sizeof(A));
  for (int m = 0; m < points; ++m) {
    point(a, b, x, row, code + m, m);
    const double r = __builtin_sqrt(dot(b.e[m], b.e[m], ld)),
                 length = __builtin_sqrt(dot(b.u[m], b.u[m], ld));
    const double step = length > 0 ? weight_of(a.position, row, m) * r / length : 0 * r;
    for (int64_t k = 0; k < ld; k += 8) store8(load8(z + k) + step * load8(b.u[m] + k), z + k);
  }
}

template <class A>
void backward_row(const Directional& a, const Buffers<A>& b, const A* x, const A* g, A* out, int64_t row,
                  int64_t code) {
  const int64_t ld = b.ld, count = a.x.count();
  const int points = a.position.data ? 2 : 1;
  double pull[2] = {0, 0};
  for (int m = 0; m < points; ++m) {
    point(a, b, x, row, code + m, m);
    const double r = __builtin_sqrt(dot(b.e[m], b.e[m], ld)),
                 length = __builtin_sqrt(dot(b.u[m], b.u[m], ld));
    const double along = length > 0 ? dot(g, b.u[m], ld) / length : 0;
    pull[m] = r > 0 ? weight_of(a.position, row, m) * along / r : 0;
    a.codes[m * count + row] = r > 0 ? code + m : -1;
    a.pull[m * count + row] = pull[m];
  }
  memcpy(out, g, (size_t)ld * sizeof(A));
  for (int m = 0; m < points; ++m) {
    // 0 times an inf would be a NaN where the term is none
    if (a.codes[m * count + row] < 0) continue;
    for (int64_t k = 0; k < ld; k += 8) store8(load8(out + k) - pull[m] * load8(b.e[m] + k), out + k);
  }
}

template <class A, bool kBackward>
void run(const Directional& a, int64_t begin, int64_t end, void* scratch) {
  const Buffers<A> b(scratch, a.x.features);
  const int64_t d = a.x.features, count = a.x.count(), last = a.codebook.inner - (a.position.data ? 2 : 1);
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = smaller(kRows, end - first);
    fetch(a.x, first, rows, b.x, b.ld);
    if (kBackward) fetch(a.grad, first, rows, b.g, b.ld);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first + r, code = value<int64_t>(a.indices, row);
      const A* const x = b.x + r * b.ld;
      A* const z = b.z + r * b.ld;
      const bool alive = code >= 0 && code <= last, good = finite(x, d);
      if (kBackward && !(alive && good))
        for (int m = 0; m < (a.position.data ? 2 : 1); ++m) a.codes[m * count + row] = -1;
      if (!alive)
        fill(z, d, (A)0);
      else if (!good)
        fill(z, d, (A)__builtin_nan(""));
      else if (kBackward)
        backward_row(a, b, x, b.g + r * b.ld, z, row, code);
      else
        forward_row(a, b, x, z, row, code);
    }
    store(b.z, b.ld, a.z, first, rows);
  }
}

void forward(const Directional& a, int64_t begin, int64_t end, void* scratch) {
  return a.wide ? run<double, false>(a, begin, end, scratch) : run<float, false>(a, begin, end, scratch);
}

void backward(const Directional& a, int64_t begin, int64_t end, void* scratch) {
  return a.wide ? run<double, true>(a, begin, end, scratch) : run<float, true>(a, begin, end, scratch);
}

}  // namespace

namespace VQK_ISA {
extern const DirectionalKernels directional;
const DirectionalKernels directional = {scratch_of, forward, backward};
}  // namespace VQK_ISA

}  // namespace vqk
