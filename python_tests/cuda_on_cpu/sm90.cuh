// mbarriers, TMA and wgmma as PTX defines them. TMA lands at random; wgmma reads shared memory when it is
// waited for or when it is issued, at random, and its accumulators are NaN until then.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace vqk::cuda::sm90 {

using emulated::current;

inline char* shared_memory() { return current->block->memory; }

// a cluster address has the rank in its upper bits
constexpr uint32_t kBase = 1024;

inline emulated::Block& block_at(uint32_t address) {
  const uint32_t rank = address >> 24;
  return rank ? (*emulated::cluster)[rank - 1] : *current->block;
}
inline uint32_t within(uint32_t address) { return address & 0xffffff; }
inline char* memory_at(emulated::Block& block, uint32_t address) {
  return block.memory + within(address) - kBase;
}

inline uint32_t shared_address(const void* p) {
  return (uint32_t)((const char*)p - current->block->memory) + kBase;
}

inline void init_barrier(uint32_t barrier, int arrivals) {
  current->block->phases[barrier] = {arrivals, arrivals, 0, 0};
}
inline void publish_barriers() {}

inline emulated::Phases& phases_at(uint32_t barrier) {
  auto& all = block_at(barrier).phases;
  const auto found = all.find(within(barrier));
  if (found == all.end()) emulated::fail("a barrier is used before it is initialised");
  return found->second;
}

inline void expect_bytes(uint32_t barrier, int bytes) {
  emulated::Phases& p = phases_at(barrier);
  p.bytes += bytes;
  p.pending--;
  p.settle();
}

inline void wait(uint32_t barrier, uint32_t parity) {
  emulated::Phases& p = phases_at(barrier);
  emulated::block_until([&p, parity] { return (p.phase & 1) != parity; });
}

inline uint32_t barrier_of(uint32_t barrier, uint32_t rank) { return barrier | (rank + 1) << 24; }

inline void arrive_at(uint32_t cluster_barrier) {
  if (block_at(cluster_barrier).alive == 0) emulated::fail("an arrival at a block that has left");
  emulated::Phases& p = phases_at(cluster_barrier);
  if (p.pending <= 0) emulated::fail("an arrival too many");
  p.pending--;
  p.settle();
}

inline uint32_t cluster_rank() { return (uint32_t)current->block->rank; }
inline void cluster_sync() {
  emulated::meet(emulated::cluster_barrier, (int)(emulated::cluster->size() * blockDim.x));
}
inline void warpgroup_sync(int group) { emulated::meet(current->block->named[1 + group], 128); }

// what cuTensorMapEncodeTiled keeps here
struct Map {
  const char* data;
  uint64_t sizes[2], pitch;
  uint32_t box[2];
};

// the swizzle is a function of address bits: 4-6 by 7-9
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y) {
  Map m;
  memcpy(&m, map, sizeof m);
  auto* blocks = emulated::cluster;
  for (uint32_t rank = 0; rank < blocks->size(); ++rank)
    emulated::transfers.push_back([=] {
      emulated::Block& block = (*blocks)[rank];
      if (block.alive == 0) emulated::fail("a copy to a block that has left");
      for (uint32_t row = 0; row < m.box[1]; ++row)
        for (uint32_t k = 0; k < m.box[0]; ++k) {
          uint16_t v = 0;
          if ((uint64_t)(x + k) < m.sizes[0] && (uint64_t)(y + row) < m.sizes[1])
            memcpy(&v, m.data + (uint64_t)(y + row) * m.pitch + (uint64_t)(x + k) * 2, 2);
          memcpy(memory_at(block, swizzled(to + row * 128 + k * 2)), &v, 2);
        }
      emulated::Phases& p = block.phases.at(barrier);
      p.bytes -= (int)(m.box[0] * m.box[1] * 2);
      p.settle();
    });
}
inline void prefetch_map(const CUtensorMap*) {}
inline void publish_rows() {}

constexpr uint32_t kUpper = 64u | 1u << 30, kNextStep = 32 >> 4;
inline uint32_t descriptor(uint32_t address) { return (address & 0x3ffff) >> 4; }
inline void prefetch_line(const void*) {}

inline void begin_products() {}

inline void finish_groups(int left) {
  while ((int)current->groups.size() > left) {
    for (const auto& each : current->groups.front()) each();
    current->groups.erase(current->groups.begin());
  }
}
inline void commit_products() {
  current->groups.push_back(current->open);
  current->open.clear();
  if (emulated::product_pace == emulated::kAny ? emulated::dice() % 2 == 0
                                               : emulated::product_pace == emulated::kSoon)
    finish_groups(0);
}
inline void await_all_but_one() { finish_groups(1); }
inline void await_products(float (&)[64]) { finish_groups(0); }

template <int kRegisters>
inline void more_registers() {}
template <int kRegisters>
inline void fewer_registers() {}

template <class H>
float operand(emulated::Block& block, uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) emulated::fail("not the 128-byte swizzle");
  const uint32_t start = (uint32_t)(descriptor & 0x3fff) << 4, stride = (uint32_t)(descriptor >> 32 & 0x3fff)
                                                                        << 4;
  H h;
  memcpy(&h, memory_at(block, swizzled(start + row / 8 * stride + row % 8 * 128 + k * 2)), 2);
  return (float)h;
}

template <class H>
void product(emulated::Block& block, int thread, float (&d)[64], uint64_t a, uint64_t b, bool first) {
  const int lane = thread % 32, row = thread / 32 % 4 * 16 + lane / 4;
  float rows[2][16];
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 16; ++k) rows[r][k] = operand<H>(block, a, row + 8 * r, k);
  for (int j = 0; j < 32; ++j) {
    float column[16];
    for (int k = 0; k < 16; ++k) column[k] = operand<H>(block, b, j / 2 * 8 + lane % 4 * 2 + j % 2, k);
    for (int r = 0; r < 2; ++r) {
      float& sum = d[j / 2 * 4 + 2 * r + j % 2];
      float total = 0;
      for (int k = 0; k < 16; ++k) total += rows[r][k] * column[k];
      sum = first ? total : sum + total;
    }
  }
}

template <class H>
void issue(float (&d)[64], uint32_t lower_a, uint32_t lower_b, bool first) {
  const uint64_t a = (uint64_t)kUpper << 32 | lower_a, b = (uint64_t)kUpper << 32 | lower_b;
  emulated::Block* block = current->block;
  const int thread = current->linear;
  float (*to)[64] = &d;
  current->open.push_back([=] { product<H>(*block, thread, *to, a, b, first); });
  if (first)
    for (float& each : d) each = NAN;
}

template <class H>
void wgmma_first(float (&d)[64], uint32_t a, uint32_t b, H) {
  issue<H>(d, a, b, true);
}
template <class H>
void wgmma(float (&d)[64], uint32_t a, uint32_t b, H) {
  issue<H>(d, a, b, false);
}

}  // namespace vqk::cuda::sm90
