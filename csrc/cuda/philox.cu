#include "device.cuh"

namespace vqk::cuda {
namespace {

__global__ void philox_kernel(const int64_t* seed, int64_t count, int64_t blocks, uint32_t stream,
                              int64_t row_offset, int64_t* words, float* out) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; n < count; n += step) {
    const Words w =
        vqk::philox((uint32_t)(n % blocks), (uint64_t)(n / blocks + row_offset), stream, (uint64_t)*seed);
    float four[4];
    normals(w, four);
    for (int q = 0; q < 4; ++q) {
      words[4 * n + q] = w.w[q];
      out[4 * n + q] = four[q];
    }
  }
}

}  // namespace

cudaError_t philox(const int64_t* seed, int64_t rows, int64_t blocks, uint32_t stream_number,
                   int64_t row_offset, int64_t* words, float* normals, cudaStream_t stream) {
  const int64_t count = rows * blocks;
  if (count == 0) return cudaSuccess;
  philox_kernel<<<grid_of(count, 256), 256, 0, stream>>>(seed, count, blocks, stream_number, row_offset,
                                                         words, normals);
  return cudaGetLastError();
}

}  // namespace vqk::cuda
