// The directional family, one warp per row. The first pass over the features measures lengths and dot
// products in float64, the second writes; the noise is drawn again, nothing is stored.
#include "device.cuh"

namespace vqk::cuda {
namespace {

enum Direction { kNoisy, kDetach, kRandom };

struct Point {
  int64_t code;  // offset of its row in the codebook
  double weight;
  uint32_t stream;
};

// four features of e = c - x and of the vector along u; 0 past the last feature
template <class A>
__device__ __forceinline__ void four(const Directional& a, const Point& p, int64_t row, int64_t from,
                                     int64_t block, A* e, A* u) {
  float v[4] = {0, 0, 0, 0};
  if (a.direction != kDetach)
    normals(vqk::philox((uint32_t)block, (uint64_t)(row + a.row_offset), p.stream, (uint64_t)*a.seed), v);
  for (int q = 0; q < 4; ++q) {
    const int64_t k = 4 * block + q;
    const bool inside = k < a.x.features;
    e[q] = inside ? read<A>(a.codebook, p.code + k * a.codebook.stride_feature) -
                        read<A>(a.x, from + k * a.x.stride_feature)
                  : A(0);
    const A noise = a.direction == kNoisy    ? (A)a.noise_std * (A)v[q] + e[q]
                    : a.direction == kDetach ? e[q]
                                             : (A)v[q];
    u[q] = inside ? noise : A(0);
  }
}

template <class A, bool kBackward>
__device__ void row_kernel(const Directional& a, int64_t row, int64_t count) {
  const int lane = threadIdx.x, points = a.position.data ? 2 : 1;
  const int64_t d = a.x.features, blocks = (d + 3) / 4, last = a.codebook.inner - points;
  const int64_t code = ((const int64_t*)a.indices.data)[offset(a.indices, row)];
  const int64_t from = offset(a.x, row), to = offset(a.z, row), up = kBackward ? offset(a.grad, row) : 0;
  const bool alive = code >= 0 && code <= last;
  bool good = true;
  for (int64_t k = lane; k < d; k += 32) good &= isfinite(read<double>(a.x, from + k * a.x.stride_feature));
  good = __all_sync(0xffffffffu, good);
  if (!alive || !good) {
    for (int64_t k = lane; k < d; k += 32) write(a.z, to + k * a.z.stride_feature, alive ? nan("") : 0.0);
    if (kBackward && lane < points) a.codes[lane * count + row] = -1;
    return;
  }
  Point p[2];
  // what multiplies u in the forward pass and e in the backward pass
  double step[2] = {0, 0};
  bool skip[2] = {false, false};
  // unrolled, so that p and what belongs to it stay in registers
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    if (m >= points) continue;
    const double at = a.position.data ? read<double>(a.position, offset(a.position, row)) : 0;
    p[m] = {offset(a.codebook, code + m), a.position.data ? (m == 0 ? 1 - at : at) : 1.0, (uint32_t)m};
    if (!kBackward && a.direction == kDetach) continue;
    double r = 0, length = 0, along = 0;
    for (int64_t block = lane; block < blocks; block += 32) {
      A e[4], u[4];
      four(a, p[m], row, from, block, e, u);
      for (int q = 0; q < 4; ++q) {
        r += (double)e[q] * (double)e[q];
        length += (double)u[q] * (double)u[q];
        if (kBackward && 4 * block + q < d)
          along += read<double>(a.grad, up + (4 * block + q) * a.grad.stride_feature) * (double)u[q];
      }
    }
    r = sqrt(warp_sum(r));
    length = sqrt(warp_sum(length));
    along = kBackward ? warp_sum(along) : 0;
    if (kBackward) {
      step[m] = r > 0 && length > 0 ? p[m].weight * (along / length) / r : 0;
      if (lane == 0) {
        a.codes[m * count + row] = r > 0 ? code + m : -1;
        a.pull[m * count + row] = step[m];
      }
      // a point without a length has no term, and 0 times an inf would make one
      skip[m] = !(r > 0);
    } else {
      step[m] = length > 0 ? p[m].weight * r / length : 0 * r;
    }
  }
  for (int64_t block = lane; block < blocks; block += 32) {
    double total[4];
    for (int q = 0; q < 4; ++q) {
      const int64_t k = 4 * block + q;
      total[q] = k >= d                   ? 0
                 : kBackward              ? read<double>(a.grad, up + k * a.grad.stride_feature)
                 : a.direction == kDetach ? 0
                                          : read<double>(a.x, from + k * a.x.stride_feature);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m >= points) continue;
      if (!kBackward && a.direction == kDetach) {
        for (int q = 0; q < 4; ++q) {
          const int64_t k = 4 * block + q;
          // the point itself, to the last bit
          if (k < d)
            total[q] = __dadd_rn(
                total[q],
                __dmul_rn(p[m].weight, read<double>(a.codebook, p[m].code + k * a.codebook.stride_feature)));
        }
        continue;
      }
      if (skip[m]) continue;
      A e[4], u[4];
      four(a, p[m], row, from, block, e, u);
      for (int q = 0; q < 4; ++q) total[q] += kBackward ? -step[m] * (double)e[q] : step[m] * (double)u[q];
    }
    for (int q = 0; q < 4; ++q)
      if (4 * block + q < d) write(a.z, to + (4 * block + q) * a.z.stride_feature, total[q]);
  }
}

template <class A, bool kBackward>
__global__ void directional_kernel(Directional a, int64_t count) {
  const int64_t step = (int64_t)gridDim.x * blockDim.y;
  for (int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; row < count; row += step)
    row_kernel<A, kBackward>(a, row, count);
}

template <class A>
void launch(const Directional& a, bool backward, int64_t count, cudaStream_t stream) {
  const dim3 threads(32, 4);
  if (backward)
    directional_kernel<A, true><<<grid_of(count, 4), threads, 0, stream>>>(a, count);
  else
    directional_kernel<A, false><<<grid_of(count, 4), threads, 0, stream>>>(a, count);
}

}  // namespace

cudaError_t directional(const Directional& args, bool backward, cudaStream_t stream) {
  const int64_t count = args.x.count();
  if (count == 0) return cudaSuccess;
  if (args.wide)
    launch<double>(args, backward, count, stream);
  else
    launch<float>(args, backward, count, stream);
  return cudaGetLastError();
}

}  // namespace vqk::cuda
