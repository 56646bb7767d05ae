// Stands for torch's header in a program without torch: empty tensors, and a pool of plain threads that a
// sanitizer sees through.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>

namespace torch::stable {

// of the calling thread, so that callers side by side can differ
inline thread_local int64_t num_threads = 1;

inline uint32_t get_num_threads() { return static_cast<uint32_t>(num_threads); }

// as at::parallel_for: ranges of equal length, the first on the calling thread, an exception thrown again
// here
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const int64_t most = (end - begin + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t threads = std::min(num_threads, most), length = (end - begin + threads - 1) / threads;
  std::exception_ptr error;
  std::mutex lock;
  const auto run = [&](int64_t thread) {
    try {
      const int64_t from = begin + thread * length;
      if (from < end) f(from, std::min(end, from + length));
    } catch (...) {
      const std::lock_guard<std::mutex> held(lock);
      error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

inline Tensor new_empty(const Tensor& self, IntHeaderOnlyArrayRef size,
                        std::optional<ScalarType> type = std::nullopt) {
  return Tensor(size.vec(), type.value_or(self.scalar_type()));
}

inline Tensor new_zeros(const Tensor& self, IntHeaderOnlyArrayRef size,
                        std::optional<ScalarType> type = std::nullopt) {
  Tensor made = new_empty(self, size, type);
  std::memset(made.data_ptr(), 0, made.bytes());
  return made;
}

inline Tensor empty_like(const Tensor& self) {
  // torch keeps strides that leave no gaps
  const bool dense = self.bytes() == static_cast<size_t>(self.numel() * self.element_size());
  return dense ? Tensor(self.sizes().vec(), self.strides().vec(), self.scalar_type())
               : Tensor(self.sizes().vec(), self.scalar_type());
}

}  // namespace torch::stable
