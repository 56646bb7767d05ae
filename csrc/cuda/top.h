// Best and second best of a stream of scores. A score is the bits of a positive float32 of fixed exponent, so
// that its low 23 bits are a fixed-point number and integers compare as the scores do.
#pragma once

#include <limits.h>
#include <stdint.h>

#include "host_device.h"

namespace vqk::cuda {

struct Top {
  int best, second;
  uint32_t code;
};

VQK_BOTH Top no_top() { return {INT_MAX, INT_MAX, 0}; }

VQK_BOTH int lesser(int a, int b) { return a < b ? a : b; }
VQK_BOTH int greater(int a, int b) { return a < b ? b : a; }

VQK_BOTH int least_of(int a, int b, int c) {
#ifdef __CUDA_ARCH__
  return __vimin3_s32(a, b, c);
#else
  return lesser(lesser(a, b), c);
#endif
}

VQK_BOTH uint32_t least_of(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  return __vimin3_u32(a, b, c);
#else
  const uint32_t ab = a < b ? a : b;
  return ab < c ? ab : c;
#endif
}

// min(a + b, c), a + b modulo 2^32
VQK_BOTH uint32_t least_sum(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  return __viaddmin_u32(a, b, c);
#else
  const uint32_t sum = a + b;
  return sum < c ? sum : c;
#endif
}

// rows of other codes: the lower code wins a tie, and the tie shows as a second best that is equal
VQK_BOTH void merge(Top& a, const Top& b) {
  a.second = lesser(greater(a.best, b.best), lesser(a.second, b.second));
  a.code = b.best < a.best || (b.best == a.best && b.code < a.code) ? b.code : a.code;
  a.best = lesser(a.best, b.best);
}

// the least of `get(0)` .. `get(kCount - 1)`: two chains of three-input minima
template <int kCount, class T, class Get>
VQK_BOTH T least(Get get) {
  constexpr int lower = kCount / 2 - 1;
  static_assert(kCount % 4 == 0);
  T a = get(0), b = get(lower);
  VQK_UNROLL
  for (int j = 1; j < lower; j += 2) a = least_of(a, get(j), get(j + 1));
  VQK_UNROLL
  for (int j = lower + 1; j < kCount; j += 2) b = least_of(b, get(j), get(j + 1));
  return a < b ? a : b;
}

// a tile in which `top` may have improved: scores `get(j)` of codes first + j; `at` is their least. Shifted
// left by five, a score drops what all scores share and makes room for j, so that the least names its code;
// subtracting it and 1 wraps it, and it alone, to the largest value, so that the next least is the runner-up.
// `shift` is 32 in a register: a multiply-add, for the pipe of the minima is the busy one.
template <int kCount, class Get>
VQK_BOTH void improve(Top& top, int at, uint32_t first, uint32_t shift, Get get) {
  static_assert(kCount <= 32);
  const auto packed = [&](int j) { return (uint32_t)get(j) * shift + (uint32_t)j; };
  const uint32_t least_packed = least<kCount, uint32_t>(packed), wrap = ~least_packed;
  uint32_t a = UINT_MAX, b = UINT_MAX;
  VQK_UNROLL
  for (int j = 0; j < kCount; j += 2) {
    a = least_sum(packed(j), wrap, a);
    b = least_sum(packed(j + 1), wrap, b);
  }
  const uint32_t next = (a < b ? a : b) + least_packed + 1;
  const int second = (int)(((uint32_t)at & 0xf8000000u) | next >> 5);
  const bool better = at < top.best;
  top.second = lesser(top.second, lesser(greater(top.best, at), better ? second : INT_MAX));
  top.code = better ? first + (least_packed & 31) : top.code;
  top.best = lesser(top.best, at);
}

// exponent of the fixed point of scores b - s with |s| <= reach, 0 <= b and 2 reach + b < 2^(log2 + 1), to
// which 2^exponent + reach is added. A padding bias of inf must lose after the shift too, and its low
// exponent bits are all ones, so no score may have them
VQK_BOTH int exponent_of(int log2_of_range) {
  const int exponent = log2_of_range + 1 < -100 ? -100 : log2_of_range + 1;
  return ((exponent + 127) & 15) == 15 ? exponent + 1 : exponent;
}

}  // namespace vqk::cuda
