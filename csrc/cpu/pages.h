// Large outputs on large pages.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <stdint.h>

namespace vqk {

// Fresh memory costs a fault per page, as much as all the arithmetic of a row pass; this is for outputs that
// are written as a whole at once. The system may refuse: it is a wish.
inline void large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage,
                  end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace vqk
