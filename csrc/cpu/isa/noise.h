// Philox words and normals, blocks side by side in vectors. A lane of 64 bits holds one 32-bit word of a
// block; what a product leaves above it is never looked at.
#pragma once

#include "../../random.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace vqk {
namespace {

#if defined(__AVX512F__)
constexpr int kBlocks = 8;  // in a vector
#elif defined(__AVX2__)
constexpr int kBlocks = 4;
#else
constexpr int kBlocks = 2;
#endif
constexpr int kTurns = 4;  // vectors of blocks in turn
constexpr int kNoise =
    4 * kBlocks * kTurns;  // values at a time: buffers of noise have room for that many more

// masked forms below: the plain ones of gcc 12 warn
typedef uint64_t lanes __attribute__((vector_size(8 * kBlocks), may_alias));
typedef uint32_t halves __attribute__((vector_size(8 * kBlocks), may_alias));

constexpr uint64_t kWord = 0xffffffffu;

// of the words in a and one in c
VQK_INLINE lanes product(lanes a, uint64_t c) {
#if defined(__AVX512F__)
  return (lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64((int64_t)c));
#elif defined(__AVX2__)
  return (lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x((int64_t)c));
#elif defined(__SSE2__)
  return (lanes)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x((int64_t)c));
#else
  return (a & kWord) * c;
#endif
}

// the key of each round
struct Keys {
  uint32_t k[10][2];
};

VQK_INLINE Keys keys_of(uint64_t seed) {
  Keys keys;
  for (uint32_t round = 0; round < 10; ++round) {
    keys.k[round][0] = (uint32_t)seed + round * 0x9E3779B9u;
    keys.k[round][1] = (uint32_t)(seed >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

// of one vector of blocks
struct LaneWords {
  lanes w[4];
};

// the generator of random.h for n vectors of blocks, in turn, so that none waits for its own products
template <int n>
VQK_INLINE void philox(const lanes* block, const lanes* row, uint32_t stream, const Keys& keys,
                       LaneWords* out) {
  lanes c0[n], c1[n], c2[n], c3[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i)
    c0[i] = block[i], c1[i] = row[i], c2[i] = row[i] >> 32, c3[i] = lanes{} + stream;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const lanes k0 = (lanes)(halves{} + keys.k[round][0]), k1 = (lanes)(halves{} + keys.k[round][1]);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      const lanes p0 = product(c0[i], 0xD2511F53u), p1 = product(c2[i], 0xCD9E8D57u);
      c0[i] = (p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = p1;
      c2[i] = (p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = p0;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) out[i] = {{c0[i], c1[i], c2[i], c3[i]}};
}

// blocks of rows, row after row, kBlocks at a time. Even lanes take the first half of them and odd lanes the
// second, which is how interleaving within 128 bits puts them in order.
struct Counter {
  lanes block, row;
  halves last, blocks;
  uint64_t step, rows;
};

VQK_INLINE Counter counter(uint64_t row, int64_t blocks) {
  Counter c;
  lanes order;
  for (int lane = 0; lane < kBlocks; ++lane) order[lane] = (uint64_t)(lane / 2 + lane % 2 * (kBlocks / 2));
  c.last = (halves)(lanes{} + (uint64_t)(blocks - 1));
  c.blocks = (halves)(lanes{} + (uint64_t)blocks);
  if (blocks >= kBlocks) {
    c.block = order;
    c.row = lanes{} + row;
    c.step = blocks > kBlocks ? kBlocks : 0;
    c.rows = blocks > kBlocks ? 0 : 1;
    return c;
  }
  for (int lane = 0; lane < kBlocks; ++lane) {
    const uint64_t at = order[lane];
    c.block[lane] = at % (uint64_t)blocks;
    c.row[lane] = row + at / (uint64_t)blocks;
  }
  c.step = (uint64_t)(kBlocks % blocks);
  c.rows = (uint64_t)(kBlocks / blocks);
  return c;
}

VQK_INLINE void advance(Counter& c) {
  c.block += c.step;
  c.row += c.rows;
  const halves over = (halves)((halves)c.block > c.last);
  c.block -= (lanes)(over & c.blocks);
  c.row += (lanes)over & 1;
}

// even words of a beside even words of b
VQK_INLINE lanes join(lanes a, lanes b) { return (a & kWord) | b << 32; }

VQK_INLINE void interleave(const float* a, const float* b, float* out) {
#if defined(__AVX512F__)
  const __m512 x = _mm512_loadu_ps(a), y = _mm512_loadu_ps(b);
  _mm512_storeu_ps(out, _mm512_maskz_unpacklo_ps(0xffff, x, y));
  _mm512_storeu_ps(out + 16, _mm512_maskz_unpackhi_ps(0xffff, x, y));
#elif defined(__AVX2__)
  const __m256 x = _mm256_loadu_ps(a), y = _mm256_loadu_ps(b);
  _mm256_storeu_ps(out, _mm256_unpacklo_ps(x, y));
  _mm256_storeu_ps(out + 8, _mm256_unpackhi_ps(x, y));
#else
  for (int l = 0; l < 2 * kBlocks; ++l) out[2 * l] = a[l], out[2 * l + 1] = b[l];
#endif
}

// Box-Muller: words 0 and 2 of a block side by side give the radii, 1 and 3 the directions
VQK_INLINE void box_muller(const LaneWords& words, float* out) {
  constexpr int kPairs = 2 * kBlocks;
  alignas(64) uint32_t first[kPairs], second[kPairs];
  alignas(64) float x[kPairs], y[kPairs];
  *(lanes*)first = join(words.w[0], words.w[2]);
  *(lanes*)second = join(words.w[1], words.w[3]);
  for (int l = 0; l < kPairs; ++l) {
    const float r = radius(first[l]);
    float c, s;
    direction(second[l], &c, &s);
    x[l] = r * c;
    y[l] = r * s;
  }
  interleave(x, y, out);
}

// normals of `rows` rows of `blocks` blocks each, row after row without a gap; up to kNoise more are written
inline void noise(uint64_t seed, uint64_t row, uint32_t stream, int64_t rows, int64_t blocks, float* out) {
  const Keys keys = keys_of(seed);
  Counter at = counter(row, blocks);
  for (int64_t k = 0; k < 4 * rows * blocks; k += kNoise) {
    lanes block[kTurns], row[kTurns];
    LaneWords words[kTurns];
#pragma GCC unroll 8
    for (int i = 0; i < kTurns; ++i, advance(at)) block[i] = at.block, row[i] = at.row;
    philox<kTurns>(block, row, stream, keys, words);
#pragma GCC unroll 8
    for (int i = 0; i < kTurns; ++i) box_muller(words[i], out + k + 4 * kBlocks * i);
  }
}

}  // namespace
}  // namespace vqk
