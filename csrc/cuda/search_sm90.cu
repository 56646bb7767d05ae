// The search of sm_90a: TMA, wgmma, clusters of two blocks.
//
// A consumer warpgroup owns 64 rows at a time, resident in shared memory as halves, and walks the tiles of a
// split of the codebook. A ring of stages (128 codes by 64 features) is filled by one thread of the producer
// warpgroup. The two blocks of a cluster walk the same tiles: each loads half of the codes of every stage
// into both, so that the codebook is read from L2 once per cluster. The stream of stages does not end with a
// row tile: warpgroups drift apart within the ring, and while one loads rows or folds scores the others
// multiply.
//
// Barriers. full[s] of a block completes when its own producer has armed it (1 arrival) and 16 KiB have come,
// half of them from the other block. empty[s] completes when every consumer warp of both blocks has read
// stage s; a producer waits for its own before it writes to both. So the other block's bytes can only reach
// full[s] in the phase they belong to: they are sent after this block's consumers have seen the previous one.
// Blocks leave together, when nothing is under way to either.
#include "fold.cuh"
#include "launch.cuh"
#include "search.h"
#include "sm90.cuh"

namespace vqk::cuda {
namespace {

// of a block with kGroups consumer warpgroups
template <int kGroups>
constexpr int kRows = 64 * kGroups;
template <int kGroups>
constexpr int kThreads = 128 * (kGroups + 1);

// mma steps of a stage
constexpr int kSteps = kChunk / kStep;

// what a block is to search, one item after another: both blocks of a cluster take the same tiles
struct Item {
  int row_tile, split, begin, end;

  __device__ __forceinline__ Item(const Search& s, int number) {
    row_tile = number / s.splits * 2 + blockIdx.x % 2;
    split = number % s.splits;
    begin = first_tile(s, split);
    end = first_tile(s, split + 1);
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// addresses of the stages, of their barriers (full, then empty), and how many there are
struct Ring {
  uint32_t stages, barriers;
  int count;

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + (kMostStages + stage) * 8; }
};

struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int count) {
    if (++stage == count) stage = 0, parity ^= 1;
  }
};

// a block's rows of a later item, which `fill` will then find in L2; by one warp
template <int kGroups>
__device__ __forceinline__ void prefetch_rows(const Search& s, int row_tile) {
  if (s.x.stride_feature != 1) return;
  const int size = s.x.type == Type::f32 ? 4 : 2, bytes = (int)s.features * size;
  const int64_t row0 = (int64_t)row_tile * kRows<kGroups>;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < kRows<kGroups> && row0 + i < s.count; i += 32) {
    const char* const from = s.x.data + offset(s.x, row0 + i) * size;
#pragma unroll 1
    for (int at = 0; at < bytes; at += 128) sm90::prefetch_line(from + at);
  }
}

// one warp, of which one lane loads
template <int kGroups>
__device__ __forceinline__ void produce(const CUtensorMap* map, const Search& s, const Ring& ring, int items,
                                        int chunks) {
  const int rank = (int)sm90::cluster_rank();
  const uint32_t stages = ring.stages + rank * (kStageBytes / 2);
  Place at;
  for (int number = blockIdx.x / 2; number < items; number += gridDim.x / 2) {
    const int next = number + (int)gridDim.x / 2;
    if (next < items) prefetch_rows<kGroups>(s, Item(s, next).row_tile);
    __syncwarp();
    if (threadIdx.x % 32 != 0) continue;
    const Item item(s, number);
#pragma unroll 1
    for (int tile = item.begin; tile < item.end; ++tile)
#pragma unroll 1
      for (int turn = 0; turn < chunks; ++turn) {
        // the last chunk, which may be short, comes first
        const int chunk = turn == 0 ? chunks - 1 : turn - 1;
        const uint32_t full = ring.full(at.stage);
        sm90::wait(ring.empty(at.stage), at.parity ^ 1);
        sm90::expect_bytes(full, kStageBytes);
        sm90::load_box(stages + at.stage * kStageBytes, map, full, chunk * kChunk,
                       tile * kTile + rank * (kTile / 2));
        at.advance(ring.count);
      }
  }
}

// this warp has read a stage: tell the producers of both blocks
__device__ __forceinline__ void release(const Ring& ring, int stage) {
  const uint32_t lane = threadIdx.x & 31;
  if (lane < 2) sm90::arrive_at(sm90::barrier_of(ring.empty(stage), lane));
}

// products of a warpgroup's rows with one tile of codes
template <class H, int kGroups, int kTail>
__device__ __forceinline__ void multiply(float (&products)[64], const Ring& ring, Place& at, uint32_t rows,
                                         uint32_t codes, int chunks) {
  // from one chunk of the rows to the next, and from stage to stage, in units of 16 bytes
  constexpr int next_rows = kRows<kGroups> * 128 / 16, next_stage = kStageBytes / 16;
  uint32_t a = rows + (chunks - 1) * next_rows, b = codes + at.stage * next_stage;
  sm90::wait(ring.full(at.stage), at.parity);
  sm90::begin_products();
  sm90::wgmma_first(products, a, b, H());
#pragma unroll
  for (int k = 1; k < kTail; ++k)
    sm90::wgmma(products, a + k * sm90::kNextStep, b + k * sm90::kNextStep, H());
  sm90::commit_products();
  int before = at.stage;
  at.advance(ring.count);
  a = rows;
#pragma unroll 1
  for (int chunk = 1; chunk < chunks; ++chunk) {
    b = codes + at.stage * next_stage;
    sm90::wait(ring.full(at.stage), at.parity);
    sm90::begin_products();
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      sm90::wgmma(products, a + k * sm90::kNextStep, b + k * sm90::kNextStep, H());
    sm90::commit_products();
    sm90::await_all_but_one();
    release(ring, before);
    before = at.stage;
    at.advance(ring.count);
    a += next_rows;
  }
  sm90::await_products(products);
  release(ring, before);
}

template <class H, int kGroups, int kTail>
__device__ __forceinline__ void consume(const Search& s, const Ring& ring, int group, char* rows,
                                        float* factors, int* largest, int items, int chunks) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31, row = 16 * warp + lane / 4;
  rows += 64 * 128 * group;
  factors += 64 * group;
  largest += group;
  const uint32_t a = sm90::descriptor(sm90::shared_address(rows)), b = sm90::descriptor(ring.stages);
  // not an immediate, so that the shift stays a multiply-add
  const uint32_t shift = 32 + (s.splits >> 30);
  Place at;
  for (int number = blockIdx.x / 2; number < items; number += gridDim.x / 2) {
    const Item item(s, number);
    const int64_t row0 = (int64_t)item.row_tile * kRows<kGroups> + 64 * group;
    // nobody of the warpgroup reads the rows of the item before any more
    sm90::warpgroup_sync(group);
    if (threadIdx.x % 128 == 0) *largest = 0;
    sm90::warpgroup_sync(group);
    float offset;
    {
      const Reach reach = reach_of(*s.prepared.spread, s.scaled);
      fill<H, 16>(s, reach, 16 * warp, rows, kRows<kGroups> * 128, factors, largest,
                  [&](int i) { return row0 + i < s.count ? row0 + i : -1; });
      sm90::publish_rows();
      sm90::warpgroup_sync(group);
      offset = offset_of(*largest, reach);
    }
    const float factor[2] = {factors[row], factors[row + 8]};
    Top top[2] = {no_top(), no_top()};
    const int end = item.end * kTile;
#pragma unroll 1
    for (int first = item.begin * kTile + 32 * (lane & 3); first < end; first += kTile) {
      float products[64];
      multiply<H, kGroups, kTail>(products, ring, at, a, b, chunks);
      fold<32>(products, s.prepared.bias + first, offset, factor, top, first, shift);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      merge_lanes(top[r]);
      const int64_t n = row0 + row + 8 * r;
      if ((lane & 3) == 0 && n < s.count)
        s.results[(int64_t)item.split * s.count + n] =
            result_of(top[r], factor[r] > 0 ? step_of(offset) : 0.0f);
    }
  }
}

#endif

template <class H, int kGroups, int kTail>
__global__ void __launch_bounds__(kThreads<kGroups>, 1)
    search_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ Search s, int items,
                  int stages) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  char* const memory = sm90::shared_memory();
  const int chunks = (s.steps + kSteps - 1) / kSteps;
  char* const stage0 = memory + chunks * (kRows<kGroups> * 128);
  float* const factors = (float*)(stage0 + stages * kStageBytes);
  int* const largest = (int*)(factors + kRows<kGroups>);
  const Ring ring{sm90::shared_address(stage0), sm90::shared_address(largest + 4), stages};
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      sm90::init_barrier(ring.full(i), 1);
      sm90::init_barrier(ring.empty(i), 2 * 4 * kGroups);
    }
    sm90::publish_barriers();
  }
  sm90::cluster_sync();
  // the same for a whole warp, and known to be
  const int group = __shfl_sync(kAll, (int)threadIdx.x / 128, 0);
  if (group == kGroups) {
    // 640 threads begin with 96 registers each: 128 * 32 + 512 * 112 = 640 * 96
    if constexpr (kGroups == 4) sm90::fewer_registers<32>();
    if (threadIdx.x / 32 == 4 * kGroups) {
      sm90::prefetch_map(&map);
      produce<kGroups>(&map, s, ring, items, chunks);
    }
    __syncwarp();
  } else {
    if constexpr (kGroups == 4) sm90::more_registers<112>();
    consume<H, kGroups, kTail>(s, ring, group, memory, factors, largest, items, chunks);
  }
  sm90::cluster_sync();
#endif
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// from the driver that is there, so that nothing links to it
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? (Encode)found : nullptr;
}

Encode encode_of_driver() {
  static const Encode encode = find_encode();
  return encode;
}

// the half copy as boxes of half a tile's codes by one stage's features; 0 past the last feature
cudaError_t map_of(const Search& s, bool bf16, CUtensorMap* map) {
  const Encode encode = encode_of_driver();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {(cuuint64_t)s.steps * kStep, (cuuint64_t)s.tiles * kTile};
  const cuuint64_t pitch[1] = {sizes[0] * 2};
  const cuuint32_t box[2] = {kChunk, kTile / 2}, strides[2] = {1, 1};
  const CUresult result = encode(
      map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, s.prepared.half,
      sizes, pitch, box, strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class H, int kGroups, int kTail>
cudaError_t launch(const Search& s, const Plan& plan, cudaStream_t stream) {
  CUtensorMap map;
  const cudaError_t error = map_of(s, std::is_same_v<H, __nv_bfloat16>, &map);
  if (error != cudaSuccess) return error;
  const Launch how{dim3(plan.grid), kThreads<kGroups>, plan.shared, stream, 2};
  return launch(how, search_kernel<H, kGroups, kTail>, map, s, (int)(plan.blocks / 2 * plan.splits),
                plan.stages);
}

}  // namespace

bool sm90_ready() { return encode_of_driver() != nullptr; }

cudaError_t search_sm90(const Search& s, const Plan& plan, bool bf16, cudaStream_t stream) {
  const int tail = (s.steps - 1) % kSteps + 1;
  if (plan.rows == 64)
    return bf16 ? launch<__nv_bfloat16, 1, 4>(s, plan, stream) : launch<__half, 1, 4>(s, plan, stream);
  if (plan.rows == 128)
    return bf16 ? launch<__nv_bfloat16, 2, 4>(s, plan, stream) : launch<__half, 2, 4>(s, plan, stream);
  if (tail == 1)
    return bf16 ? launch<__nv_bfloat16, 4, 1>(s, plan, stream) : launch<__half, 4, 1>(s, plan, stream);
  if (tail == 2)
    return bf16 ? launch<__nv_bfloat16, 4, 2>(s, plan, stream) : launch<__half, 4, 2>(s, plan, stream);
  return bf16 ? launch<__nv_bfloat16, 4, 4>(s, plan, stream) : launch<__half, 4, 4>(s, plan, stream);
}

}  // namespace vqk::cuda
