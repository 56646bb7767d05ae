// Torch tensors on the stable ABI as the bodies see them, and what every op needs around its body.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cpu/rows.h"

namespace vqk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    default:
      STD_TORCH_CHECK(false, "native: tensors must be floating point; got another dtype. Call .float().");
  }
  return Type::f32;
}

// (B, M, D), (K, D) with batch 1, or (B, M) with one feature; grouped: the first of as many as t.size(0)
inline Rows rows_of(const Tensor& t, bool features = true, bool grouped = false) {
  const int64_t first = grouped ? 1 : 0;
  const int64_t *const sizes = t.sizes().data() + first, *const strides = t.strides().data() + first;
  const int64_t dims = t.dim() - first, last = features ? dims - 1 : dims;
  STD_TORCH_CHECK(last == 1 || last == 2,
                  "native: tensors must have 1 or 2 leading dims; got another rank. Reshape them.");
  Rows rows;
  // the outputs come through here as well
  rows.data = (char*)t.data_ptr();
  rows.type = t.scalar_type() == ScalarType::Long ? Type::f64 : type_of(t);
  rows.batch = last == 2 ? sizes[0] : 1;
  rows.stride_batch = last == 2 ? strides[0] : 0;
  rows.inner = sizes[last - 1];
  rows.stride_inner = strides[last - 1];
  rows.features = features ? sizes[dims - 1] : 1;
  rows.stride_feature = features ? strides[dims - 1] : 1;
  return rows;
}

// rows of another group than the first
inline Rows group_of(Rows rows, const Tensor& t, int64_t group) {
  if (group > 0) rows.data += group * t.stride(0) * size_of(rows.type);
  return rows;
}

inline void check_indices(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long,
                  "native: indices must be int64; got another dtype. Call .long().");
}

// its only element is read: an empty one has no memory
inline uint64_t seed_of(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == 1,
                  "native: seed must be a 0-d int64 tensor; got another. Pass torch.tensor(seed).");
  return static_cast<uint64_t>(*t.const_data_ptr<int64_t>());
}

inline Rows no_rows() { return Rows{nullptr, Type::f32, 1, 0, 1, 0, 0, 1}; }

inline void check_same_rows(const Rows& x, const Rows& other, const char* name) {
  STD_TORCH_CHECK(x.batch == other.batch && x.inner == other.inner, "native: ", name,
                  " must have one entry per row of x; got another shape. Reshape it.");
}

inline void check_pair(const Rows& x, const Rows& codebook, int64_t min_codes) {
  STD_TORCH_CHECK(
      x.features == codebook.features && codebook.batch == 1 && codebook.inner >= min_codes && x.features > 0,
      "native: codebook must be (K, D) to match x; got another shape. Reshape it.");
}

// how many groups a search has: 1 where the codebook is (K, D)
inline int64_t groups_of(const Tensor& x, const Tensor& codebook, const MaybeTensor& dither) {
  if (codebook.dim() != 3) return 1;
  const int64_t groups = codebook.size(0);
  STD_TORCH_CHECK(groups > 0 && x.dim() > 0 && x.size(0) == groups,
                  "native: x must be (G, B, M, D) or (G, M, D) with a codebook (G, K, D); got another shape. "
                  "Reshape it.");
  STD_TORCH_CHECK(!dither || (dither->dim() == 2 && dither->size(0) == groups),
                  "native: dither must be (G, K - 1); got another shape. Pass one weight per segment.");
  return groups;
}

inline ScalarType distance_type(const Rows& x, const Rows& codebook) {
  return x.type == Type::f64 || codebook.type == Type::f64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace vqk
