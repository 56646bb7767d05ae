#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace vqk::cpu {

std::tuple<Tensor, Tensor> philox(Tensor seed, int64_t rows, int64_t blocks, int64_t stream,
                                  int64_t row_offset) {
  const PhiloxKernels& body = *kernels().philox;
  const uint64_t key = seed_of(seed);
  STD_TORCH_CHECK(rows >= 0 && blocks >= 0,
                  "native: rows and blocks must be at least 0; got a negative number. Pass 0 or more.");
  Tensor words = torch::stable::new_empty(seed, {rows, blocks, 4}, ScalarType::Long);
  Tensor normals = torch::stable::new_empty(seed, {rows, blocks, 4}, ScalarType::Float);
  int64_t* const w = words.mutable_data_ptr<int64_t>();
  float* const n = normals.mutable_data_ptr<float>();
  const int64_t at_once = std::max<int64_t>(1, 4096 / std::max<int64_t>(blocks, 1));
  each_task((rows + at_once - 1) / at_once, 0, [&](int64_t task, void*) {
    const int64_t begin = task * at_once, end = std::min(rows, begin + at_once);
    if (blocks > 0)
      body.rows(key, static_cast<uint64_t>(begin + row_offset), static_cast<uint32_t>(stream), end - begin,
                blocks, w + 4 * blocks * begin, n + 4 * blocks * begin);
  });
  return {words, normals};
}

}  // namespace vqk::cpu
