// Sums of rows per code: one block per code walks its rows in the order of the sort, so the result is one
// result.
#include "device.cuh"

namespace vqk::cuda {
namespace {

__global__ void usable_codes_kernel(Rows x, Rows indices, int64_t count, int64_t num_codes, int64_t* codes) {
  const int64_t step = (int64_t)gridDim.x * blockDim.y;
  for (int64_t n = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; n < count; n += step) {
    const int64_t code = ((const int64_t*)indices.data)[offset(indices, n)], from = offset(x, n);
    bool good = code >= 0 && code < num_codes;
    for (int64_t k = threadIdx.x; k < x.features; k += 32)
      good &= isfinite(read<double>(x, from + k * x.stride_feature));
    good = __all_sync(0xffffffffu, good);
    if (threadIdx.x == 0) codes[n] = good ? code : -1;
  }
}

// first place in the sorted codes that is not below `code`
__device__ int64_t lower_bound(const int64_t* sorted, int64_t count, int64_t code) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sorted[middle] < code)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class A>
__global__ void sums_kernel(Sums args, int64_t rows) {
  for (int64_t j = blockIdx.x; j < args.codes; j += gridDim.x) {
    const int64_t begin = lower_bound(args.sorted, args.count, j),
                  end = lower_bound(args.sorted, args.count, j + 1);
    if (args.counts && threadIdx.x == 0) args.counts[j] = end - begin;
    for (int64_t k = threadIdx.x; k < args.x.features; k += blockDim.x) {
      double total = 0;
      const A code = args.codebook.data
                         ? read<A>(args.codebook, offset(args.codebook, j) + k * args.codebook.stride_feature)
                         : A(0);
      for (int64_t at = begin; at < end; ++at) {
        const int64_t entry = args.entries[at];
        const A v = read<A>(args.x, offset(args.x, entry % rows) + k * args.x.stride_feature);
        total += args.codebook.data ? args.pull[entry] * (double)(code - v) : (double)v;
      }
      write(args.out, offset(args.out, j) + k * args.out.stride_feature, total);
    }
  }
}

}  // namespace

cudaError_t usable_codes(const Rows& x, const Rows& indices, int64_t num_codes, int64_t* codes,
                         cudaStream_t stream) {
  const int64_t count = x.count();
  if (count == 0) return cudaSuccess;
  usable_codes_kernel<<<grid_of(count, 8), dim3(32, 8), 0, stream>>>(x, indices, count, num_codes, codes);
  return cudaGetLastError();
}

cudaError_t sums(const Sums& args, cudaStream_t stream) {
  const int64_t rows = args.x.count();
  const unsigned int blocks = grid_of(args.codes, 1);
  if (args.wide)
    sums_kernel<double><<<blocks, 128, 0, stream>>>(args, rows);
  else
    sums_kernel<float><<<blocks, 128, 0, stream>>>(args, rows);
  return cudaGetLastError();
}

}  // namespace vqk::cuda
