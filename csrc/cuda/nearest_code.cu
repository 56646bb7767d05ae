// Certified search in float32, then the contract's order in float64 for the rows that stay open. The bound is
// that of csrc/cpu/isa/nearest_code.cpp without centre and scale: what float32 cannot hold is left open.
#include "device.cuh"

namespace vqk::cuda {
namespace {

constexpr int kTile = 64, kSide = 16, kEach = kTile / kSide;
constexpr double kSlack = 1 + 1e-8;

// exact points in float64, their float32 copies, biases and spread; one warp per code
__global__ void prepare_kernel(NearestCode a) {
  const int64_t d = a.x.features, step = (int64_t)gridDim.x * blockDim.y;
  const Rows& c = a.codebook;
  for (int64_t j = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; j < a.codes; j += step) {
    const int64_t from = offset(c, j);
    const double weight = a.dither.data ? read<double>(a.dither, offset(a.dither, j)) : 0;
    double square = 0, rest = 0;
    bool good = true;
    for (int64_t k = threadIdx.x; k < d; k += 32) {
      double v = read<double>(c, from + k * c.stride_feature);
      if (a.dither.data) {
        const double next = read<double>(c, offset(c, j + 1) + k * c.stride_feature);
        v = __dadd_rn(__dmul_rn(1 - weight, v), __dmul_rn(weight, next));
      }
      const double r = v - (double)(float)v;
      good &= isfinite(v);
      square += v * v;
      rest += r * r;
      a.points[j * d + k] = v;
    }
    good = __all_sync(0xffffffffu, good);
    square = warp_sum(square);
    rest = warp_sum(rest);
    // a code that cannot win must not make a NaN of a score
    for (int64_t k = threadIdx.x; k < d; k += 32)
      a.rounded[j * d + k] = good ? (float)a.points[j * d + k] : 0.0f;
    if (threadIdx.x != 0) continue;
    a.bias[j] = good ? (float)(-0.5 * square) : -INFINITY;
    if (!good) continue;
    atomicMax(&a.spread->norm, (unsigned long long)__double_as_longlong(sqrt(square) * kSlack));
    atomicMax(&a.spread->residual, (unsigned long long)__double_as_longlong(sqrt(rest) * kSlack));
    atomicMin(&a.spread->first_finite, (unsigned long long)j);
  }
}

// 2 (E + T), or inf
__device__ double margin_of(const NearestCode& a, double square, double rest) {
  const double d = (double)a.x.features, x = sqrt(square) * kSlack, r = sqrt(rest) * kSlack;
  const double c = __longlong_as_double((long long)a.spread->norm);
  const double residual = __longlong_as_double((long long)a.spread->residual);
  const double b = 0.5 * c * c, ch = c + residual, xh = x + r, reach = x + c;
  const double n = (d + 2) * 0x1p-24, g = n / (1 - n);
  // written so that a NaN refuses
  if (!(n < 0.5 && xh * ch + b < 0x1p126 && reach < 0x1p511)) return INFINITY;
  const double error =
      r * ch + x * residual + g * (xh * ch + b) + (0x1p-24 + (d + 16) * 0x1p-52) * b + 4 * (d + 2) * 0x1p-126;
  return 2 * (error + (d + 4) * 0x1p-52 * reach * reach + (d + 2) * 0x1p-1074) * kSlack;
}

__device__ double literal(const NearestCode& a, int64_t from, int64_t j) {
  double total = 0;
  for (int64_t k = 0; k < a.x.features; ++k) {
    const double t =
        __dsub_rn(read<double>(a.x, from + k * a.x.stride_feature), a.points[j * a.x.features + k]);
    total = __dadd_rn(total, __dmul_rn(t, t));
  }
  return total;
}

__device__ void answer(const NearestCode& a, int64_t row, int64_t index, double sq_dist) {
  a.indices[row] = index;
  if (a.wide)
    ((double*)a.sq_dist)[row] = sq_dist;
  else
    ((float*)a.sq_dist)[row] = (float)sq_dist;
}

// best score and its code, and the score of the runner-up
struct Top {
  float best, second;
  int64_t index;

  __device__ __forceinline__ void add(float score, int64_t j) {
    second = fmaxf(second, fminf(best, score));
    index = score > best ? j : index;
    best = fmaxf(best, score);
  }
};

// 64 rows per block against tiles of 64 codes; a thread holds 4 x 4 scores
__global__ void __launch_bounds__(kSide* kSide) search_kernel(NearestCode a, int64_t count) {
  __shared__ float xs[kSide][kTile], cs[kSide][kTile];
  const int64_t d = a.x.features;
  const int tx = threadIdx.x, ty = threadIdx.y, thread = ty * kSide + tx;
  for (int64_t first = (int64_t)blockIdx.x * kTile; first < count; first += (int64_t)gridDim.x * kTile) {
    Top top[kEach];
    for (int r = 0; r < kEach; ++r) top[r] = {-INFINITY, -INFINITY, 0};
    for (int64_t code = 0; code < a.codes; code += kTile) {
      float score[kEach][kEach];
      for (int q = 0; q < kEach; ++q) {
        const int64_t j = code + tx + q * kSide;
        for (int r = 0; r < kEach; ++r) score[r][q] = j < a.codes ? a.bias[j] : -INFINITY;
      }
      for (int64_t k0 = 0; k0 < d; k0 += kSide) {
        for (int at = thread; at < kSide * kTile; at += kSide * kSide) {
          const int k = at % kSide, n = at / kSide;
          const int64_t row = first + n, j = code + n;
          xs[k][n] = row < count && k0 + k < d
                         ? (float)read<double>(a.x, offset(a.x, row) + (k0 + k) * a.x.stride_feature)
                         : 0.0f;
          cs[k][n] = j < a.codes && k0 + k < d ? a.rounded[j * d + k0 + k] : 0.0f;
        }
        __syncthreads();
        for (int k = 0; k < kSide; ++k) {
          float c[kEach];
          for (int q = 0; q < kEach; ++q) c[q] = cs[k][tx + q * kSide];
          for (int r = 0; r < kEach; ++r) {
            const float x = xs[k][ty + r * kSide];
            for (int q = 0; q < kEach; ++q) score[r][q] = fmaf(x, c[q], score[r][q]);
          }
        }
        __syncthreads();
      }
      for (int r = 0; r < kEach; ++r)
        for (int q = 0; q < kEach; ++q) top[r].add(score[r][q], code + tx + q * kSide);
    }
    for (int r = 0; r < kEach; ++r) {
      const int64_t row = first + ty + r * kSide, from = row < count ? offset(a.x, row) : 0;
      double square = 0, rest = 0;
      if (row < count)
        for (int64_t k = tx; k < d; k += kSide) {
          const double v = read<double>(a.x, from + k * a.x.stride_feature), e = v - (double)(float)v;
          square += v * v;
          rest += e * e;
        }
      // the sixteen threads of a row are the half of a warp
      for (int step = kSide / 2; step > 0; step /= 2) {
        const float best = __shfl_xor_sync(0xffffffffu, top[r].best, step);
        const float second = __shfl_xor_sync(0xffffffffu, top[r].second, step);
        const int64_t index = __shfl_xor_sync(0xffffffffu, top[r].index, step);
        top[r].second = fmaxf(fmaxf(top[r].second, second), fminf(top[r].best, best));
        top[r].index =
            best > top[r].best || (best == top[r].best && index < top[r].index) ? index : top[r].index;
        top[r].best = fmaxf(top[r].best, best);
        square += __shfl_xor_sync(0xffffffffu, square, step);
        rest += __shfl_xor_sync(0xffffffffu, rest, step);
      }
      if (row >= count || tx != 0) continue;
      const double margin = margin_of(a, square, rest);
      const bool certain = margin < (double)INFINITY && top[r].best > -INFINITY &&
                           (!a.exact || (double)top[r].best - margin > (double)top[r].second);
      if (certain)
        answer(a, row, top[r].index, literal(a, from, top[r].index));
      else
        a.indices[row] = -1;
    }
  }
}

// every code of every open row, in the contract's order; one block per row
__global__ void rescore_kernel(NearestCode a, int64_t count) {
  __shared__ double least[256];
  __shared__ int64_t where[256];
  const int thread = threadIdx.x;
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    const bool open = a.indices[row] < 0;
    __syncthreads();
    if (!open) continue;
    const int64_t from = offset(a.x, row);
    bool good = a.spread->first_finite != ~0ull;
    for (int64_t k = thread; k < a.x.features; k += blockDim.x)
      good &= isfinite(read<double>(a.x, from + k * a.x.stride_feature));
    if (!__syncthreads_and(good)) {
      if (thread == 0) answer(a, row, 0, nan(""));
      continue;
    }
    double best = INFINITY;
    int64_t index = (int64_t)a.spread->first_finite;
    for (int64_t j = thread; j < a.codes; j += blockDim.x) {
      // a code that is not finite gives inf or NaN, and neither is less
      const double v = literal(a, from, j);
      if (v < best) best = v, index = j;
    }
    least[thread] = best;
    where[thread] = index;
    __syncthreads();
    for (int step = blockDim.x / 2; step > 0; step /= 2) {
      if (thread < step) {
        const double v = least[thread + step];
        const int64_t j = where[thread + step];
        if (v < least[thread] || (v == least[thread] && j < where[thread]))
          least[thread] = v, where[thread] = j;
      }
      __syncthreads();
    }
    if (thread == 0) answer(a, row, where[0], least[0]);
  }
}

__global__ void reset_kernel(Spread* spread) { *spread = {0, 0, ~0ull}; }

}  // namespace

cudaError_t nearest_code(const NearestCode& args, cudaStream_t stream) {
  const int64_t count = args.x.count();
  if (count == 0) return cudaSuccess;
  reset_kernel<<<1, 1, 0, stream>>>(args.spread);
  prepare_kernel<<<grid_of(args.codes, 4), dim3(32, 4), 0, stream>>>(args);
  search_kernel<<<grid_of(count, kTile), dim3(kSide, kSide), 0, stream>>>(args, count);
  rescore_kernel<<<grid_of(count < 65536 ? count : 65536, 1), 256, 0, stream>>>(args, count);
  return cudaGetLastError();
}

}  // namespace vqk::cuda
