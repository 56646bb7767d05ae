// Tensors as the bodies see them: plain pointers, sizes and strides.
#pragma once

#include <stdint.h>

namespace vqk {

enum class Type : int { f16, bf16, f32, f64 };

// (B, M, D) of any strides; row n is (n / M, n % M)
struct Rows {
  char* data;
  Type type;
  int64_t batch, inner, features;
  int64_t stride_batch, stride_inner, stride_feature;  // in elements
  // always inlined here and below, so that no copy compiled for one instruction set serves another
  __attribute__((always_inline)) int64_t count() const { return batch * inner; }
};

static inline __attribute__((always_inline)) int64_t size_of(Type type) {
  return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
}

}  // namespace vqk
