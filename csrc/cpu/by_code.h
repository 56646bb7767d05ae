// Sums of rows by code, over all threads.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace vqk::cpu {

// entries in the order of their code, stable; code -1 is left out
struct ByCode {
  Memory<int64_t> starts;  // (K + 1)
  Memory<int64_t> entries;

  ByCode(const int64_t* codes, int64_t count, int64_t num_codes)
      : starts(memory<int64_t>(num_codes + 1)), entries(memory<int64_t>(count)) {
    // every part has places of its own for each code; no more parts than pay for them
    const int64_t worth = count / std::max<int64_t>(num_codes, 1 << 13);
    const int64_t parts = std::clamp<int64_t>(worth, 1, torch::stable::get_num_threads());
    const auto places = memory<int64_t>(parts * num_codes);
    const auto each = [&](auto visit) {
      each_task(parts, 0, [&](int64_t part, void*) {
        visit(places.get() + part * num_codes, part * count / parts, (part + 1) * count / parts);
      });
    };
    each([&](int64_t* at, int64_t begin, int64_t end) {
      std::fill_n(at, num_codes, 0);
      for (int64_t n = begin; n < end; ++n)
        if (codes[n] >= 0) ++at[codes[n]];
    });
    int64_t next = 0;
    for (int64_t j = 0; j < num_codes; ++j) {
      starts[j] = next;
      for (int64_t part = 0; part < parts; ++part) {
        int64_t& at = places[part * num_codes + j];
        const int64_t here = at;
        at = next;
        next += here;
      }
    }
    starts[num_codes] = next;
    each([&](int64_t* at, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        if (codes[n] >= 0) entries[at[codes[n]]++] = n;
    });
  }
};

// how columns() is to take rows: features at a time, 0 where sorting serves better
struct Columns {
  bool across;
  int slab;

  Columns(const CodeSumsKernels& body, const Sums& args) {
    const Rows& x = args.x;
    across = std::abs(x.stride_feature) > std::abs(x.stride_inner) && x.features > 1 && x.inner > 1;
    slab = body.slab(x, args.wide, across);
    // a table of every code pays where rows are many beside codes and it stays near
    if (!across && (args.codes > 1 << 12 || args.entries < 4 * args.codes)) slab = 0;
  }
};

// fills args.out from args.x and the codes in args.by_row, some features at a time
inline void sum_columns(const CodeSumsKernels& body, const Sums& args, const Columns& how) {
  // a table that stays near, and something to do for every thread
  constexpr int64_t kMost = 1 << 15;
  const int64_t slabs = (args.x.features + how.slab - 1) / how.slab,
                threads = torch::stable::get_num_threads();
  const int64_t parts = std::max((args.codes + kMost - 1) / kMost, (threads + slabs - 1) / slabs);
  const int64_t codes = (args.codes + parts - 1) / parts;
  each_task(slabs * parts, body.columns_scratch(codes, how.across), [&](int64_t task, void* scratch) {
    const int64_t begin = task / slabs * codes, end = std::min(args.codes, begin + codes);
    if (begin < end) body.columns(args, how.across, task % slabs * how.slab, begin, end, scratch);
  });
}

// the same from the sort
inline void sum_sorted(const CodeSumsKernels& body, Sums args, const ByCode& by_code) {
  const int64_t d = args.x.features;
  args.starts = by_code.starts.get();
  args.sorted = by_code.entries.get();
  // long enough that edges are few, short enough to spread over threads; a constant, so that sums do not vary
  args.chunk = 512;
  const int64_t chunks = (args.starts[args.codes] + args.chunk - 1) / args.chunk;
  const auto edges = memory<double>(2 * chunks * d);
  args.edges = edges.get();
  const size_t scratch = body.scratch(d);
  each_task(chunks, scratch, [&](int64_t chunk, void* at) { body.sums(args, chunk, at); });
  const int64_t codes = std::max<int64_t>(1, (1 << 16) / d);
  each_task((args.codes + codes - 1) / codes, scratch, [&](int64_t task, void* at) {
    body.join(args, task * codes, std::min(args.codes, (task + 1) * codes), at);
  });
}

}  // namespace vqk::cpu
