// Squares of floats turned over in registers.
#pragma once

#include "../../random.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace vqk {
namespace {

#if defined(__AVX2__)
constexpr int64_t kSquare = 8;
#else
constexpr int64_t kSquare = 4;
#endif

// out[j * to + i] = in[i * from + j]
VQK_INLINE void turn_square(const float* in, int64_t from, float* out, int64_t to) {
#if defined(__AVX2__)
  __m256 a[8], b[8];
  // halves of rows i and i + 4 side by side, so that the rest stays within 128 bits
  for (int i = 0; i < 4; ++i) {
    const float *const upper = in + i * from, *const lower = in + (i + 4) * from;
    a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper)), _mm_loadu_ps(lower), 1);
    a[i + 4] =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper + 4)), _mm_loadu_ps(lower + 4), 1);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    b[i + 2] = _mm256_unpacklo_ps(a[i + 2], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
    _mm256_storeu_ps(out + i * to, _mm256_shuffle_ps(b[i], b[i + 2], 0x44));
    _mm256_storeu_ps(out + (i + 1) * to, _mm256_shuffle_ps(b[i], b[i + 2], 0xee));
    _mm256_storeu_ps(out + (i + 2) * to, _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44));
    _mm256_storeu_ps(out + (i + 3) * to, _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee));
  }
#elif defined(__SSE2__)
  __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + from), c = _mm_loadu_ps(in + 2 * from),
         d = _mm_loadu_ps(in + 3 * from);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + to, b);
  _mm_storeu_ps(out + 2 * to, c);
  _mm_storeu_ps(out + 3 * to, d);
#else
  for (int i = 0; i < kSquare; ++i)
    for (int j = 0; j < kSquare; ++j) out[j * to + i] = in[i * from + j];
#endif
}

// out[j * to + i] = in[i * from + j] for i < rows, j < columns. The side with the longer stride goes outside:
// its lines may all fall into few sets of a cache, and then stay for one square only.
VQK_INLINE void turn(const float* in, int64_t from, int64_t rows, int64_t columns, float* out, int64_t to) {
  const int64_t i_whole = rows / kSquare * kSquare, j_whole = columns / kSquare * kSquare;
  if (from > to)
    for (int64_t i = 0; i < i_whole; i += kSquare)
      for (int64_t j = 0; j < j_whole; j += kSquare)
        turn_square(in + i * from + j, from, out + j * to + i, to);
  else
    for (int64_t j = 0; j < j_whole; j += kSquare)
      for (int64_t i = 0; i < i_whole; i += kSquare)
        turn_square(in + i * from + j, from, out + j * to + i, to);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < i_whole ? j_whole : 0; j < columns; ++j) out[j * to + i] = in[i * from + j];
}

}  // namespace
}  // namespace vqk
