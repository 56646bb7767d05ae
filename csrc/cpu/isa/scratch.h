// Memory that a caller hands over as one piece, divided.
#pragma once

#include "../../random.h"

namespace vqk {
namespace {

VQK_INLINE int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

VQK_INLINE char* take(char*& at, int64_t bytes) {
  char* const here = at;
  at += padded(bytes, 64);
  return here;
}

}  // namespace
}  // namespace vqk
