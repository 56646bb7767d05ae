// The CPU bodies of the ops, one file each.
#pragma once

#include <tuple>
#include <vector>

#include "../tensors.h"

namespace vqk::cpu {

std::tuple<Tensor, Tensor> nearest_code(Tensor x, Tensor codebook, MaybeTensor dither, bool exact,
                                        std::vector<Tensor> parts);
// what nearest_code takes as `parts`
std::vector<Tensor> prepare_codes(Tensor codebook, ScalarType x_dtype);
std::tuple<Tensor, Tensor, Tensor> nearest_segment(Tensor x, Tensor codebook);
Tensor directional(Tensor x, Tensor codebook, Tensor indices, MaybeTensor position, Tensor seed,
                   int64_t direction, double noise_std, int64_t row_offset);
std::tuple<Tensor, Tensor> directional_backward(Tensor grad, Tensor x, Tensor codebook, Tensor indices,
                                                MaybeTensor position, Tensor seed, int64_t direction,
                                                double noise_std, int64_t row_offset);
std::tuple<Tensor, Tensor, Tensor> straight_through(Tensor x, Tensor codebook, Tensor indices);
std::tuple<Tensor, Tensor> straight_through_backward(Tensor grad, Tensor pull, Tensor x, Tensor codebook,
                                                     Tensor indices, bool rotation, double commitment,
                                                     double codebook_weight, double sync, bool need_x,
                                                     bool need_codebook);
std::tuple<Tensor, Tensor> code_sums(Tensor x, Tensor indices, int64_t num_codes);
std::tuple<Tensor, Tensor> philox(Tensor seed, int64_t rows, int64_t blocks, int64_t stream,
                                  int64_t row_offset);

}  // namespace vqk::cpu
