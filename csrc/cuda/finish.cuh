// After the search: merge the splits, measure the winner in float64, certify it, or list the row as open;
// then decide the open rows between their candidates.
#pragma once

#include "fold.cuh"

namespace vqk::cuda {

// rows that are to be searched in float64
struct Left {
  unsigned int* count;
  uint32_t* rows;  // (N)
};

struct Finish {
  Search search;
  int64_t codes;
  bool exact;
  Open open;
  Left left;
  Answers answers;
};

__device__ __forceinline__ Top merged(const Search& s, int64_t row, float* step) {
  Top top = no_top();
  for (int split = 0; split < s.splits; ++split) {
    const uint4 r = __ldg(s.results + (int64_t)split * s.count + row);
    merge(top, {(int)r.x, (int)r.y, r.z});
    *step = __uint_as_float(r.w);
  }
  return top;
}

// what is measured of a row in one pass
struct Measure {
  double square, distance;  // |x|^2, |x - p|^2
  float lost;               // |x' - xh|^2 in the row's own scale
};

template <int kLanes>
__device__ __forceinline__ void sum_lanes(Measure& m) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    m.square += __shfl_xor_sync(kAll, m.square, step);
    m.distance += __shfl_xor_sync(kAll, m.distance, step);
    m.lost += __shfl_xor_sync(kAll, m.lost, step);
  }
}

// fewer registers would spill where ptxas of sm_100 hoists loads
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFinishBlocks = 1;
#else
constexpr int kFinishBlocks = 2;
#endif

// kLanes neighbouring lanes share a row: 8 where features are contiguous, 1 where rows are, as in NCHW.
// kWhole: rows and codes are read by sixteen bytes and the points are the codes
template <int kLanes, bool kWhole>
static __global__ void __launch_bounds__(256, kFinishBlocks + kWhole)
    finish_kernel(const __grid_constant__ Finish f) {
  const Search& s = f.search;
  const int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool live = row < s.count;
  const int64_t from = live ? offset(s.x, row) : 0;
  const Spread spread = *s.prepared.spread;
  const Reach reach = reach_of(spread, s.scaled);
  float step = 0;
  const Top top = live ? merged(s, row, &step) : no_top();
  // a row that is not held may name any code
  const int64_t code = (int64_t)top.code < f.codes ? (int64_t)top.code : 0;
  int shift = reach.exponent;
  if (s.scaled) {
    float largest = 0;
#pragma unroll 1
    for (int64_t k = 8 * lane; live && k < s.features; k += 8 * kLanes) {
      float v[8];
      load8<kWhole>(s.x, s.vector, from, k, v);
#pragma unroll
      for (int q = 0; q < 8; ++q) largest = fmaxf(largest, fabsf(v[q]));
    }
#pragma unroll
    for (int m = 1; m < kLanes; m *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, m));
    if (largest > 0 && largest < INFINITY) shift = scale_of(largest);
  }
  const Scale scale(s.scaled ? shift : 0);
  const Point point(s.points, code);
  Measure m{};
#pragma unroll 1
  for (int64_t k = 8 * lane; live && k < s.features; k += 8 * kLanes) {
    float v[8];
    double p[8];
    load8<kWhole>(s.x, s.vector, from, k, v);
    point.load<kWhole>(s.points, k, p);
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      const double x = v[q], t = x - p[q];
      m.square += x * x;
      m.distance += t * t;
      if (s.scaled) {
        const float whole = scale(v[q]), r = whole - __half2float(__float2half_rn(whole));
        m.lost += r * r;
      }
    }
  }
  sum_lanes<kLanes>(m);
  const bool first = live && lane == 0;
  // square is NaN or inf where the row is
  const bool answerless = spread.finite == 0 || !(m.square < (double)INFINITY);
  const double unit = ldexp(1.0, reach.exponent);
  // the float32 sum of residuals is good to D 2^-24
  const double lost = sqrt((double)m.lost) * ldexp(1.01, reach.exponent - shift);
  const Bound bound = bound_of(sqrt(m.square) * unit * kSlack, s.scaled ? lost : 0, step, s.features, reach);
  const double gap = ((double)top.second - (double)top.best) * (double)step;
  const bool certain = bound.holds && (!f.exact || gap > 2 * (bound.error + bound.literal));
  if (first && (answerless || certain))
    f.answers.put(row, answerless ? 0 : code, answerless ? nan("") : m.distance);
  const bool open = first && !answerless && !certain;
  const bool narrow = open && bound.holds;
  const unsigned int slot = append(f.open.count, narrow);
  const bool kept = narrow && slot < f.open.capacity;
  if (kept) {
    const double bar = 0.5 * (m.distance - m.square) * unit * unit + bound.error + 3 * bound.literal;
    f.open.rows[slot] = (uint32_t)row;
    f.open.bars[slot] = __double2float_ru(bar);
    f.open.found[slot] = 0;
  }
  const unsigned int place = append(f.left.count, open && !kept);
  if (open && !kept) f.left.rows[place] = (uint32_t)row;
}

// the contract's distance, features ascending, nothing fused
__device__ __forceinline__ double literal(const Search& s, int64_t from, int64_t j) {
  const Point point(s.points, j);
  double total = 0;
#pragma unroll 1
  for (int64_t k = 0; k < s.features; k += 8) {
    float v[8];
    double p[8];
    load8(s.x, s.vector, from, k, v);
    point.load(s.points, k, p);
#pragma unroll
    for (int q = 0; q < 8; ++q)
      if (k + q < s.features) total = add_square(total, v[q], p[q]);
  }
  return total;
}

// one warp per open row, one lane per candidate
static __global__ void __launch_bounds__(256) settle_kernel(const __grid_constant__ Finish f) {
  const unsigned int count = min(*f.open.count, f.open.capacity), lane = threadIdx.x & 31;
  const unsigned int warps = gridDim.x * (blockDim.x / 32);
  for (unsigned int slot = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; slot < count; slot += warps) {
    const unsigned int found = f.open.found[slot];
    const int64_t row = f.open.rows[slot];
    if (found == 0 || found > kCandidates) {
      if (lane == 0) f.left.rows[atomicAdd(f.left.count, 1u)] = (uint32_t)row;
      continue;
    }
    double least = INFINITY;
    uint32_t code = UINT_MAX;
    if (lane < found) {
      code = f.open.codes[(int64_t)slot * kCandidates + lane];
      least = literal(f.search, offset(f.search.x, row), code);
    }
#pragma unroll
    for (int m = 16; m > 0; m /= 2) {
      const double other = __shfl_xor_sync(kAll, least, m);
      const uint32_t index = __shfl_xor_sync(kAll, code, m);
      if (other < least || (other == least && index < code)) least = other, code = index;
    }
    if (lane == 0) f.answers.put(row, code, least);
  }
}

}  // namespace vqk::cuda
