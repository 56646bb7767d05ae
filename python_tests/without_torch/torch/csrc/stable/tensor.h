// Stands for torch's header in a program without torch: a tensor on the heap with what the ops ask of one.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace torch::stable {

using headeronly::IntHeaderOnlyArrayRef;
using headeronly::ScalarType;

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short: return 2;
    default: return 1;
  }
}

class Tensor {
 public:
  Tensor(std::vector<int64_t> sizes, std::vector<int64_t> strides, ScalarType type)
      : sizes_(std::move(sizes)), strides_(std::move(strides)), type_(type) {
    int64_t length = 1;
    for (size_t i = 0; i < sizes_.size(); ++i) length += (sizes_[i] - 1) * strides_[i];
    const auto bytes = static_cast<size_t>(numel() == 0 ? 0 : length * element_size());
    data_ = std::shared_ptr<char[]>(new char[bytes]);
    // nan in every float: what an op leaves unwritten shows
    std::memset(data_.get(), 0xff, bytes);
    bytes_ = bytes;
  }
  Tensor(const std::vector<int64_t>& sizes, ScalarType type) : Tensor(sizes, contiguous(sizes), type) {}

  void* data_ptr() const { return data_.get(); }
  void* mutable_data_ptr() const { return data_.get(); }
  const void* const_data_ptr() const { return data_.get(); }
  template <class T>
  T* mutable_data_ptr() const {
    return reinterpret_cast<T*>(data_.get());
  }
  template <class T>
  const T* const_data_ptr() const {
    return reinterpret_cast<const T*>(data_.get());
  }

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }
  int64_t element_size() const { return bytes_of(type_); }
  // of the memory behind it, gaps included
  size_t bytes() const { return bytes_; }
  ScalarType scalar_type() const { return type_; }
  IntHeaderOnlyArrayRef sizes() const { return {sizes_.data(), sizes_.size()}; }
  IntHeaderOnlyArrayRef strides() const { return {strides_.data(), strides_.size()}; }
  int64_t size(int64_t at) const { return sizes_[static_cast<size_t>(at)]; }
  int64_t stride(int64_t at) const { return strides_[static_cast<size_t>(at)]; }
  bool is_contiguous() const { return strides_ == contiguous(sizes_); }
  bool defined() const { return true; }
  bool is_cpu() const { return true; }

 private:
  static std::vector<int64_t> contiguous(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * sizes[i - 1];
    return strides;
  }

  std::vector<int64_t> sizes_, strides_;
  ScalarType type_;
  std::shared_ptr<char[]> data_;
  size_t bytes_ = 0;
};

}  // namespace torch::stable
