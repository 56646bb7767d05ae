// Rows of the directional family as its arithmetic wants them, where they are or in buffers of one thread.
#pragma once

#include "convert.h"
#include "noise.h"
#include "units.h"

namespace vqk {
namespace {

// rows between noise and result
constexpr int64_t kRows = 16;

VQK_INLINE int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }

// rows that are copied together where they do not lie as the arithmetic wants them: a few cache lines of a
// feature's own, within the second cache
VQK_INLINE int64_t copied(int64_t d) {
  const int64_t fitting = (1 << 14) / padded(d) / kRows * kRows;
  return fitting < kRows ? kRows : fitting > 4 * kRows ? 4 * kRows : fitting;
}

template <class A>
VQK_INLINE bool is(Type type) {
  return type == (sizeof(A) == 4 ? Type::f32 : Type::f64);
}

// rows where they are, or in a buffer padded with zeros to whole units
template <class A>
struct View {
  A* at;
  int64_t stride;
  bool copy;
};

template <class A>
VQK_INLINE View<A> view(const Rows& rows, int64_t begin, int64_t n, A* buffer) {
  const int64_t d = rows.features, b = begin / rows.inner, m = begin % rows.inner;
  if (is<A>(rows.type) && rows.stride_feature == 1 && d % kUnit<A> == 0 && m + n <= rows.inner)
    return {(A*)rows.data + b * rows.stride_batch + m * rows.stride_inner, rows.stride_inner, false};
  return {buffer, padded(d), true};
}

template <class A>
VQK_INLINE void pad(A* rows, int64_t n, int64_t d, int64_t ld) {
  if (d < ld)
    for (int64_t r = 0; r < n; ++r)
      for (int64_t k = d; k < ld; ++k) rows[r * ld + k] = 0;
}

// buffers of one thread
template <class A>
struct Buffers {
  A *x, *g, *z;  // (copied, ld)
  A* c[2];       // (kRows, ld), codes that are copied
  A* u[2];       // (kRows, ld), the directions before they are normalised
  float* v[2];   // (kRows, ld), noise
};

VQK_INLINE int64_t noise_room(int64_t d) { return kRows * padded(d) + kNoise; }

template <class A>
VQK_INLINE Buffers<A> buffers(void* scratch, int64_t d) {
  const int64_t block = copied(d) * padded(d), rows = kRows * padded(d);
  Buffers<A> b;
  b.x = (A*)scratch;
  b.g = b.x + block;
  b.z = b.g + block;
  b.c[0] = b.z + block;
  b.c[1] = b.c[0] + rows;
  b.u[0] = b.c[1] + rows;
  b.u[1] = b.u[0] + rows;
  b.v[0] = (float*)(b.u[1] + rows);
  b.v[1] = b.v[0] + noise_room(d);
  return b;
}

size_t scratch_of(int64_t d) {
  const int64_t block = copied(d) * padded(d), rows = kRows * padded(d);
  return (size_t)(8 * (3 * block + 4 * rows) + 4 * 2 * noise_room(d));
}

}  // namespace
}  // namespace vqk
