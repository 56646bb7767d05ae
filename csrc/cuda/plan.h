// How a search is cut: formats, padding, tiles, shared memory and splits. Plain C++, so that it is tested
// where no GPU is.
#pragma once

#include <stdint.h>

#include <initializer_list>

#include "../cpu/rows.h"
#include "host_device.h"

namespace vqk::cuda {

// codes of a tile, features of a stage (128 bytes of halves, the width of the swizzle), features of one mma
constexpr int kTile = 128, kChunk = 64, kStep = 16;
constexpr int kStageBytes = kTile * kChunk * 2;
constexpr int kMostStages = 6;
// candidates of an open row that are kept; a row with more is searched in float64
constexpr int kCandidates = 16;
// rows of one item of the float64 search, and its items in flight
constexpr int kBruteRows = 8, kBruteBlocks = 512;

// what the tensor cores multiply: the inputs themselves, float16 copies scaled by powers of two, or nothing
enum class Format : int { bf16, f16, scaled, wide };

inline Format format_of(Type x, Type codebook, bool dithered) {
  if (x == Type::f64 || codebook == Type::f64) return Format::wide;
  if (dithered || x != codebook || x == Type::f32) return Format::scaled;
  return x == Type::bf16 ? Format::bf16 : Format::f16;
}

constexpr VQK_BOTH int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr VQK_BOTH int64_t padded_codes(int64_t codes) { return round_up(codes, kTile); }

// a last chunk of three steps is padded to four, and so is any beyond 256 features: fewer kernels, little
// lost
constexpr VQK_BOTH int64_t padded_features(int64_t features) {
  const int64_t steps = (features + kStep - 1) / kStep;
  return (steps > 16 || steps % 4 == 3 ? round_up(steps, 4) : steps) * kStep;
}

// the accumulators give lane q of four the columns 8 i + 2 q + b; stored at this row of its tile, code 32 q +
// 2 i + b is that column, and a thread's codes are neighbours
constexpr VQK_BOTH int place_of(int code) { return (code >> 1 & 15) << 3 | code >> 5 << 1 | (code & 1); }

struct Chip {
  int major, minor, processors;
  int block_shared;  // bytes
};

struct Plan {
  bool hopper;
  int rows;  // of a block; 0: no tile fits, every row goes to the float64 search
  int stages, shared;
  int64_t blocks;  // row tiles; hopper: an even number of them
  int splits;
  unsigned int grid;  // hopper: blocks that walk over row tiles and splits
};

// a row tile, the ring of stages, and what a block keeps beside them
constexpr int64_t shared_bytes(int64_t rows, int64_t features, int stages) {
  return round_up(features, kChunk) * 2 * rows + (int64_t)stages * kStageBytes + rows * 4 + 128;
}

// the split that ends first: waves of blocks, each the tiles of a split and two tiles' worth of prologue
constexpr int splits_of(int64_t blocks, int64_t tiles, int64_t slots) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= 64 && splits <= tiles; ++splits) {
    const int64_t waves = (blocks * splits + slots - 1) / slots, each = (tiles + splits - 1) / splits + 2;
    if (waves * each < least) least = waves * each, best = splits;
  }
  return best;
}

constexpr Plan plan_of(int64_t count, int64_t codes, int64_t features, const Chip& chip) {
  const int64_t tiles = padded_codes(codes) / kTile;
  Plan plan{};
  plan.hopper = chip.major == 9 && chip.minor == 0;
  if (plan.hopper)
    for (int rows : {256, 128, 64})
      for (int stages = kMostStages; stages >= (rows == 64 ? 3 : 4) && plan.rows == 0; --stages)
        if (shared_bytes(rows, features, stages) <= chip.block_shared) plan.rows = rows, plan.stages = stages;
  plan.hopper = plan.rows != 0;
  if (!plan.hopper) {
    plan.stages = 3;
    for (int rows : {128, 32})
      if (plan.rows == 0 && shared_bytes(rows, features, 3) <= chip.block_shared) plan.rows = rows;
  }
  if (plan.rows == 0) return plan;
  plan.shared = (int)shared_bytes(plan.rows, features, plan.stages);
  plan.blocks = (count + plan.rows - 1) / plan.rows;
  if (!plan.hopper) {
    plan.splits = splits_of(plan.blocks, tiles, chip.processors);
    return plan;
  }
  // clusters of two blocks, each walking over pairs of row tiles
  plan.blocks = round_up(plan.blocks, 2);
  const int64_t clusters = chip.processors / 2;
  plan.splits = splits_of(plan.blocks / 2, tiles, clusters);
  const int64_t items = plan.blocks / 2 * plan.splits;
  plan.grid = (unsigned int)(2 * (items < clusters ? items : clusters));
  return plan;
}

// open rows whose candidates are kept
constexpr int64_t open_capacity(int64_t count) {
  const int64_t share = count / 2, least = 4096;
  return share > least ? share : count < least ? count : least;
}

}  // namespace vqk::cuda
