// Philox words and normals for sixteen blocks at a time.
#pragma once

#include "../../random.h"

namespace vqk {
namespace {

constexpr int kBlocks = 16;          // blocks of four words at a time
constexpr int kNoise = 4 * kBlocks;  // values at a time; noise buffers are padded to this

VQK_INLINE void words16(uint32_t block, uint64_t row, uint32_t stream, uint64_t seed,
                        uint32_t (*w)[kBlocks]) {
  for (int l = 0; l < kBlocks; ++l) {
    const Words words = philox(block + (uint32_t)l, row, stream, seed);
    w[0][l] = words.w[0];
    w[1][l] = words.w[1];
    w[2][l] = words.w[2];
    w[3][l] = words.w[3];
  }
}

VQK_INLINE void normals16(const uint32_t (*w)[kBlocks], float* out) {
  float n[4][kBlocks];
  for (int l = 0; l < kBlocks; ++l) {
    const Words words = {{w[0][l], w[1][l], w[2][l], w[3][l]}};
    float four[4];
    normals(words, four);
    n[0][l] = four[0];
    n[1][l] = four[1];
    n[2][l] = four[2];
    n[3][l] = four[3];
  }
  for (int l = 0; l < kBlocks; ++l)
    for (int q = 0; q < 4; ++q) out[4 * l + q] = n[q][l];
}

// `count` rounded up to kNoise normals of one row
inline void noise(uint64_t seed, uint64_t row, uint32_t stream, int64_t count, float* out) {
  uint32_t w[4][kBlocks];
  for (int64_t k = 0; k < count; k += kNoise) {
    words16((uint32_t)(k / 4), row, stream, seed, w);
    normals16(w, out + k);
  }
}

}  // namespace
}  // namespace vqk
