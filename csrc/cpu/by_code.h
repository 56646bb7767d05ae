// Rows sorted by code, and their sums.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace vqk::cpu {

// entries in the order of their code, stable; codes[entry] = -1 is left out
struct ByCode {
  Memory<int64_t> starts;  // (K + 1)
  Memory<int64_t> entries;

  ByCode(const int64_t* codes, int64_t count, int64_t num_codes)
      : starts(memory<int64_t>(num_codes + 1)), entries(memory<int64_t>(count)) {
    std::fill_n(starts.get(), num_codes + 1, 0);
    for (int64_t n = 0; n < count; ++n)
      if (codes[n] >= 0) ++starts[codes[n] + 1];
    for (int64_t j = 0; j < num_codes; ++j) starts[j + 1] += starts[j];
    // each start walks to the next one's place, so shift them back afterwards
    for (int64_t n = 0; n < count; ++n)
      if (codes[n] >= 0) entries[starts[codes[n]]++] = n;
    for (int64_t j = num_codes; j > 0; --j) starts[j] = starts[j - 1];
    starts[0] = 0;
  }
};

// fills args.out from args.x and the sort
inline void sum_by_code(const CodeSumsKernels& body, Sums args, const ByCode& sorted) {
  args.starts = sorted.starts.get();
  args.entries = sorted.entries.get();
  // long enough that edges are few, short enough to spread over threads; a constant, so that sums do not vary
  args.chunk = 512;
  const int64_t chunks = (args.starts[args.codes] + args.chunk - 1) / args.chunk;
  const auto edges = memory<double>(2 * chunks * args.x.features);
  args.edges = edges.get();
  const size_t scratch = body.scratch(args.x.features);
  each_task(chunks, scratch, [&](int64_t chunk, void* at) { body.sums(args, chunk, at); });
  each_task(1, scratch, [&](int64_t, void* at) { body.sums(args, -1, at); });
}

}  // namespace vqk::cpu
