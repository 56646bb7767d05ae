// The search by mma.sync and cp.async, for every GPU from sm_80 on that has no wgmma; and, on every GPU, the
// pass that looks for the candidates of rows that stayed open.
#include "fold.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "search.h"

namespace vqk::cuda {
namespace {

constexpr int kThreads = 256, kStages = 3;

// warps along rows and along codes, each 32 rows
template <int kAlongRows>
struct Shape {
  static constexpr int rows = 32 * kAlongRows, along_codes = kThreads / 32 / kAlongRows;
  static constexpr int codes = kTile / along_codes;  // of a warp
  static constexpr int count = codes / 4;            // of a thread
};

// the pieces of one stage that the codebook has; what it has not is never multiplied
__device__ __forceinline__ void stage(const Search& s, char* to, int64_t tile, int chunk) {
  const int64_t width = s.steps * (int64_t)kStep * 2;
  const char* const from = (const char*)s.prepared.half + tile * kTile * width + chunk * (kChunk * 2);
  const int pieces = s.steps * 2 - chunk * 8;
#pragma unroll
  for (int i = 0; i < kStageBytes / 16 / kThreads; ++i) {
    const int at = threadIdx.x + i * kThreads, row = at >> 3, piece = at & 7;
    if (piece < pieces) mma::copy(to + piece_at(row, piece), from + row * width + piece * 16);
  }
}

template <class S, class H>
__device__ __forceinline__ void multiply_chunk(float (&products)[2][2 * S::count], const char* rows,
                                               const char* codes, int steps) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row0 = warp / S::along_codes * 32, code0 = warp % S::along_codes * S::codes;
  const int local = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
  for (int k = 0; k < steps; ++k) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
      mma::load_matrices(a[m], rows + piece_at(row0 + 16 * m + 8 * low + local, 2 * k + high));
#pragma unroll
    for (int n = 0; n < S::codes / 16; ++n) {
      uint32_t b[4];
      mma::load_matrices(b, codes + piece_at(code0 + 16 * n + 8 * high + local, 2 * k + low));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma::multiply(&products[m][8 * n], a[m], b, H());
        mma::multiply(&products[m][8 * n + 4], a[m], b + 2, H());
      }
    }
  }
}

// products of a block's rows with tiles begin .. end - 1, each handed to `use` with the thread's first code
template <class S, class H, class Use>
__device__ __forceinline__ void walk(const Search& s, const char* rows, char* ring, int begin, int end,
                                     Use use) {
  const int chunks = (s.steps + 3) / 4, total = (end - begin) * chunks;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int mine = 32 * (lane & 3) + warp % S::along_codes * S::count;
  float products[2][2 * S::count];
  const auto clear = [&] {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < 2 * S::count; ++j) products[m][j] = 0;
  };
  clear();
  int tile = begin, chunk = 0, next_tile = begin, next_chunk = 0;
  const auto fetch = [&](int slot) {
    if (next_tile < end) {
      stage(s, ring + slot * kStageBytes, next_tile, next_chunk);
      if (++next_chunk == chunks) next_chunk = 0, ++next_tile;
    }
    // an empty group keeps the count
    mma::commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  int slot = 0, free = kStages - 1;
  for (int i = 0; i < total; ++i) {
    mma::arrived<kStages - 2>();
    // this stage is everybody's, and the one before it is nobody's any more
    __syncthreads();
    fetch(free);
    multiply_chunk<S, H>(products, rows + chunk * (S::rows * 128), ring + slot * kStageBytes,
                         min(4, s.steps - 4 * chunk));
    if (++slot == kStages) slot = 0;
    if (++free == kStages) free = 0;
    if (++chunk == chunks) {
      use(products, tile * kTile + mine);
      clear();
      chunk = 0;
      ++tile;
    }
  }
  mma::arrived<0>();
  __syncthreads();
}

// where the parts of a block's shared memory begin
template <class S>
struct Layout {
  char *rows, *ring;
  float* factor;
  int* largest;

  __device__ __forceinline__ Layout(char* memory, int steps)
      : rows(memory),
        ring(memory + (steps + 3) / 4 * (S::rows * 128)),
        factor((float*)(ring + kStages * kStageBytes)),
        largest((int*)(factor + S::rows)) {}
};

template <class S, class H, class RowOf>
__device__ __forceinline__ void fill_block(const Search& s, const Reach& reach, const Layout<S>& at,
                                           RowOf row_of) {
  constexpr int each = S::rows / (kThreads / 32);
  if (threadIdx.x == 0) *at.largest = 0;
  __syncthreads();
  fill<H, each>(s, reach, threadIdx.x / 32 * each, at.rows, S::rows * 128, at.factor, at.largest, row_of);
  __syncthreads();
}

template <int kAlongRows, class H>
__global__ void __launch_bounds__(kThreads, 1) search_kernel(Search s) {
  using S = Shape<kAlongRows>;
  const Layout<S> at(mma::shared_memory(), s.steps);
  const Reach reach = reach_of(*s.prepared.spread, s.scaled);
  const int64_t row0 = (int64_t)blockIdx.x * S::rows;
  const int split = blockIdx.y;
  fill_block<S, H>(s, reach, at, [&](int i) { return row0 + i < s.count ? row0 + i : -1; });
  const float offset = offset_of(*at.largest, reach);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = warp / S::along_codes * 32 + lane / 4;
  Top top[2][2];
  float factor[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[m][r] = no_top();
      factor[m][r] = at.factor[row + 16 * m + 8 * r];
    }
  const int begin = first_tile(s, split), end = first_tile(s, split + 1);
  // not an immediate, so that the shift stays a multiply-add
  const uint32_t shift = 32 + (s.splits >> 30);
  walk<S, H>(s, at.rows, at.ring, begin, end, [&](float (&products)[2][2 * S::count], int first) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      fold<S::count>(products[m], s.prepared.bias + first, offset, factor[m], top[m], first, shift);
  });
  Top* const parts = (Top*)at.ring;  // (warps along codes, rows)
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      merge_lanes(top[m][r]);
      if ((lane & 3) == 0) parts[warp % S::along_codes * S::rows + row + 16 * m + 8 * r] = top[m][r];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < S::rows && row0 + i < s.count; i += kThreads) {
    Top all = parts[i];
    for (int w = 1; w < S::along_codes; ++w) merge(all, parts[w * S::rows + i]);
    s.results[(int64_t)split * s.count + row0 + i] =
        result_of(all, at.factor[i] > 0 ? step_of(offset) : 0.0f);
  }
}

template <int kAlongRows, class H>
__global__ void __launch_bounds__(kThreads, 1) candidates_kernel(Search s, Open open) {
  using S = Shape<kAlongRows>;
  const unsigned int count = min(*open.count, open.capacity);
  const int groups = (int)((count + S::rows - 1) / S::rows);
  if (groups == 0) return;
  // few open rows: the blocks share the codes
  const int splits = max(1, min(s.tiles, (int)gridDim.x / groups));
  const Layout<S> at(mma::shared_memory(), s.steps);
  const Reach reach = reach_of(*s.prepared.spread, s.scaled);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = warp / S::along_codes * 32 + lane / 4;
  for (int64_t item = blockIdx.x; item < (int64_t)groups * splits; item += gridDim.x) {
    const unsigned int slot0 = (unsigned int)(item / splits) * S::rows;
    const int split = (int)(item % splits);
    fill_block<S, H>(s, reach, at,
                     [&](int i) { return slot0 + i < count ? (int64_t)open.rows[slot0 + i] : (int64_t)-1; });
    float factor[2][2], bar[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = row + 16 * m + 8 * r;
        factor[m][r] = at.factor[i];
        bar[m][r] = slot0 + i < count ? open.bars[slot0 + i] : -INFINITY;
      }
    const int begin = (int)((int64_t)s.tiles * split / splits),
              end = (int)((int64_t)s.tiles * (split + 1) / splits);
    walk<S, H>(s, at.rows, at.ring, begin, end, [&](float (&products)[2][2 * S::count], int first) {
#pragma unroll
      for (int j = 0; j < S::count; ++j) {
        const float bias = __ldg(s.prepared.bias + first + j);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float score = __fmaf_rn(products[m][4 * (j / 2) + 2 * r + (j & 1)], factor[m][r], bias);
            if (!(score <= bar[m][r])) continue;
            const unsigned int slot = slot0 + row + 16 * m + 8 * r, place = atomicAdd(open.found + slot, 1u);
            if (place < kCandidates)
              open.codes[(int64_t)slot * kCandidates + place] = first + j;
            else
              // the list is full: a collapsed codebook must not count to K
              bar[m][r] = -INFINITY;
          }
      }
    });
  }
}

}  // namespace

cudaError_t search_mma(const Search& s, const Plan& plan, bool bf16, cudaStream_t stream) {
  const Launch how{dim3((unsigned int)plan.blocks, (unsigned int)plan.splits), kThreads, plan.shared, stream};
  if (plan.rows == 128)
    return bf16 ? launch(how, search_kernel<4, __nv_bfloat16>, s) : launch(how, search_kernel<4, __half>, s);
  return bf16 ? launch(how, search_kernel<1, __nv_bfloat16>, s) : launch(how, search_kernel<1, __half>, s);
}

cudaError_t candidates(const Search& s, const Open& open, const Plan& plan, int blocks, bool bf16,
                       cudaStream_t stream) {
  const Launch how{dim3((unsigned int)blocks), kThreads, plan.shared, stream};
  if (plan.rows == 128)
    return bf16 ? launch(how, candidates_kernel<4, __nv_bfloat16>, s, open)
                : launch(how, candidates_kernel<4, __half>, s, open);
  return bf16 ? launch(how, candidates_kernel<1, __nv_bfloat16>, s, open)
              : launch(how, candidates_kernel<1, __half>, s, open);
}

}  // namespace vqk::cuda
