// Counter-based noise for host and device: Philox-4x32-10 and Box-Muller (see vqkernels/philox.py).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define VQK_INLINE static __host__ __device__ __forceinline__
#else
// always inlined, so that no copy compiled for one instruction set is linked into another
#define VQK_INLINE static inline __attribute__((always_inline))
#endif

namespace vqk {

struct Words {
  uint32_t w[4];
};

// counter (block, row mod 2^32, row >> 32, stream), key (seed mod 2^32, seed >> 32)
VQK_INLINE Words philox(uint32_t block, uint64_t row, uint32_t stream, uint64_t seed) {
  uint32_t c0 = block, c1 = (uint32_t)row, c2 = (uint32_t)(row >> 32), c3 = stream;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

VQK_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

VQK_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// sqrt(-2 ln u), u = ((w >> 8) + 1) 2^-24, relative error 1e-7: u = 2^e (1 + f) with |f| < 0.42, f exact,
// ln(1 + f) = f - f^2/2 + f^3 P(f) keeps its relative accuracy up to u = 1; e ln 2 in two parts
VQK_INLINE float radius(uint32_t w) {
  const float u = (float)(int32_t)((w >> 8) + 1) * 0x1p-24f;
  const int32_t bits = (int32_t)bits_of(u), e = (bits - 0x3f3504f3) >> 23;
  const float f = float_of((uint32_t)(bits - e * (1 << 23))) - 1.0f, scale = (float)e;
  float p = -0.0810155869f;
  p = p * f + 0.127123073f;
  p = p * f - 0.129722387f;
  p = p * f + 0.142021745f;
  p = p * f - 0.166422471f;
  p = p * f + 0.200014681f;
  p = p * f - 0.25000298f;
  p = p * f + 0.333333284f;
  const float tail = f * f * f * p - scale * 2.12194440e-4f - 0.5f * f * f;
  return sqrtf(-2.0f * ((f + tail) + scale * 0.693359375f));
}

// cos and sin of 2 pi u, u = (w >> 8) 2^-24, absolute error 1e-7: the quadrant and what is left are exact
VQK_INLINE void direction(uint32_t w, float* cosine, float* sine) {
  const int32_t k = (int32_t)(w >> 8), quadrant = (k + (1 << 21)) >> 22;
  const float t = (float)(k - quadrant * (1 << 22)) * 0x1p-22f, t2 = t * t;
  float s = -0.0046021631f;
  s = s * t2 + 0.0796802193f;
  s = s * t2 - 0.64596349f;
  s = (s * t2 + 1.57079637f) * t;
  float c = 0.000903629872f;
  c = c * t2 - 0.0208600704f;
  c = c * t2 + 0.253669202f;
  c = c * t2 - 1.23370051f;
  c = c * t2 + 1.0f;
  const float x = quadrant & 1 ? s : c, y = quadrant & 1 ? c : s;
  const uint32_t flip_x = (uint32_t)(quadrant + 1) << 30 & 0x80000000u,
                 flip_y = (uint32_t)quadrant << 30 & 0x80000000u;
  *cosine = float_of(bits_of(x) ^ flip_x);
  *sine = float_of(bits_of(y) ^ flip_y);
}

// four standard normals of one block
VQK_INLINE void normals(const Words& words, float* out) {
  const float r0 = radius(words.w[0]), r1 = radius(words.w[2]);
  float c0, s0, c1, s1;
  direction(words.w[1], &c0, &s0);
  direction(words.w[3], &c1, &s1);
  out[0] = r0 * c0;
  out[1] = r0 * s0;
  out[2] = r1 * c1;
  out[3] = r1 * s1;
}

}  // namespace vqk
