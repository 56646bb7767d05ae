// Threads of torch's pool and their memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "rows.h"

namespace vqk {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// aligned for the widest vectors
template <class T>
using Memory = std::unique_ptr<T[], Free>;

template <class T>
Memory<T> memory(int64_t count) {
  // not aligned_alloc, whose size is a multiple of 64: a sanitizer shall see the first byte past the end
  void* p = nullptr;
  if (posix_memalign(&p, 64, static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T)) != 0)
    throw std::bad_alloc();
  return Memory<T>(static_cast<T*>(p));
}

// visit(task, scratch) for every task; a thread that is done takes the next. What a task computes must not
// depend on the thread, nor on the order.
template <class Visit>
void each_task(int64_t tasks, size_t scratch_bytes, const Visit& visit) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    const auto scratch = memory<char>(static_cast<int64_t>(scratch_bytes));
    for (int64_t task = next++; task < tasks; task = next++) visit(task, scratch.get());
  });
}

// visits ranges of rows, multiples of 64 of them but for the last; a thread takes one after the other
template <class Visit>
void each_range(const Rows& rows, size_t scratch_bytes, const Visit& visit) {
  const int64_t count = rows.count(),
                at_once = std::clamp<int64_t>((1 << 14) / rows.features / 64 * 64, 64, 1024);
  each_task((count + at_once - 1) / at_once, scratch_bytes, [&](int64_t task, void* scratch) {
    visit(task * at_once, std::min(count, (task + 1) * at_once), scratch);
  });
}

}  // namespace vqk
