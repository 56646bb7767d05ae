// mma.sync, ldmatrix and cp.async as PTX defines them, over a warp of fibers. Copies land when they are
// waited for or before, at random.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace vqk::cuda::mma {

inline char* shared_memory() { return emulated::current->block->memory; }

// matrix i is read from the rows that lanes 8 i .. 8 i + 7 point to; lane l gets two halves of row l / 4
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulated::Warp& w = *emulated::current->warp;
  const int lane = emulated::current->linear % 32;
  w.slots[lane] = (unsigned long long)row;
  emulated::meet_warp();
  for (int i = 0; i < 4; ++i) memcpy(&r[i], (const char*)w.slots[8 * i + lane / 4] + lane % 4 * 4, 4);
  emulated::meet_warp();
}

template <class H>
float half_at(uint32_t word, int which) {
  const uint16_t bits = (uint16_t)(word >> 16 * which);
  H h;
  memcpy(&h, &bits, 2);
  return (float)h;
}

template <class H>
inline void multiply(float* d, const uint32_t (&a)[4], const uint32_t* b, H) {
  emulated::Warp& w = *emulated::current->warp;
  const int lane = emulated::current->linear % 32, g = lane / 4, q = lane % 4;
  memcpy(w.words[lane], a, 16);
  memcpy(w.words[lane] + 4, b, 8);
  emulated::meet_warp();
  for (int k = 0; k < 16; ++k) {
    // lane 4 g + q holds a of rows g, g + 8 and b of column g, for k = 2 q, 2 q + 1 (+ 8)
    const int owner = k / 2 % 4;
    for (int r = 0; r < 2; ++r)
      for (int c = 0; c < 2; ++c)
        d[2 * r + c] += half_at<H>(w.words[4 * g + owner][k / 8 * 2 + r], k % 2) *
                        half_at<H>(w.words[4 * (2 * q + c) + owner][4 + k / 8], k % 2);
  }
  emulated::meet_warp();
}

// the groups of wgmma serve for copies here
inline void copy(void* to, const void* from) {
  emulated::current->open.push_back([=] { memcpy(to, from, 16); });
}

inline void commit() {
  emulated::Fiber& f = *emulated::current;
  if (emulated::copy_pace == emulated::kAny ? emulated::dice() % 2 == 0
                                            : emulated::copy_pace == emulated::kSoon) {
    for (const auto& each : f.open) each();
    f.open.clear();
  }
  f.groups.push_back(f.open);
  f.open.clear();
}

template <int kLeft>
inline void arrived() {
  emulated::Fiber& f = *emulated::current;
  while ((int)f.groups.size() > kLeft) {
    for (const auto& each : f.groups.front()) each();
    f.groups.erase(f.groups.begin());
  }
}

}  // namespace vqk::cuda::mma
