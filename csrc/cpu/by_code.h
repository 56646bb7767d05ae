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

// entries of each code
inline void count_codes(const int64_t* codes, int64_t count, int64_t num_codes, int64_t* out) {
  const int64_t worth = count / std::max<int64_t>(num_codes, 1 << 13);
  const int64_t parts = std::clamp<int64_t>(worth, 1, torch::stable::get_num_threads());
  const auto counts = memory<int64_t>(parts * num_codes);
  each_task(parts, 0, [&](int64_t part, void*) {
    int64_t* const own = counts.get() + part * num_codes;
    std::fill_n(own, num_codes, 0);
    const int64_t* const end = codes + (part + 1) * count / parts;
    for (const int64_t* code = codes + part * count / parts; code < end; ++code)
      if (*code >= 0) ++own[*code];
  });
  std::copy_n(counts.get(), num_codes, out);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t j = 0; j < num_codes; ++j) out[j] += counts[part * num_codes + j];
}

// how columns() is to take rows: features at a time, 0 where sorting serves better, and in how many pieces;
// as the order of the sums follows from it, it depends on the data alone
struct Columns {
  bool across;
  int slab;
  int64_t slabs, code_parts, row_parts;

  Columns(const CodeSumsKernels& body, const Sums& args) {
    // codes whose table stays near, and how often their rows may be read again for it
    constexpr int64_t kMost = 1 << 15, kAgain = 4;
    // doubles in all tables, rows beside codes that pay for one more, pieces enough for many threads
    constexpr int64_t kRoom = 1 << 19, kWorth = 32, kPieces = 8;
    const Rows& x = args.x;
    across = std::abs(x.stride_feature) > std::abs(x.stride_inner) && x.features > 1 && x.inner > 1;
    slab = body.slab(x, args.wide, across);
    if (across ? args.codes > kAgain * kMost : args.codes > 1 << 12 || args.entries < 4 * args.codes)
      slab = 0;
    if (slab == 0) return;
    slabs = (x.features + slab - 1) / slab;
    code_parts = std::max<int64_t>(1, (args.codes + kMost - 1) / kMost);
    const int64_t codes = std::max<int64_t>(args.codes, 1);
    row_parts = std::min({args.entries / (kWorth * codes), kRoom / (codes * slabs * slab), kPieces / slabs});
    row_parts = code_parts > 1 ? 1 : std::max<int64_t>(row_parts, 1);
  }
};

// fills args.out from args.x and the codes in args.by_row, some features at a time
inline void sum_columns(const CodeSumsKernels& body, const Sums& args, const Columns& how) {
  const int64_t codes = (args.codes + how.code_parts - 1) / how.code_parts, count = args.x.count(),
                rows = (count + how.row_parts - 1) / how.row_parts, table = codes * how.slab;
  const bool apart = how.row_parts > 1;
  const auto tables = memory<double>(apart ? how.row_parts * how.slabs * table : 0);
  const auto at = [&](int64_t slab, int64_t row_part, int64_t code_begin, int64_t code_end) {
    return Slab{how.across,
                slab * how.slab,
                code_begin,
                std::min(args.codes, code_end),
                std::min(count, row_part * rows),
                std::min(count, (row_part + 1) * rows),
                apart ? tables.get() + (row_part * how.slabs + slab) * table : nullptr};
  };
  each_task(how.slabs * how.code_parts * how.row_parts, body.columns_scratch(codes, how.across),
            [&](int64_t task, void* scratch) {
              const int64_t part = task / how.slabs;
              const int64_t begin = part % how.code_parts * codes;
              if (begin >= args.codes) return;
              body.columns(args, at(task % how.slabs, part / how.code_parts, begin, begin + codes), scratch);
            });
  if (!apart) return;
  constexpr int64_t kCodes = 128;
  each_task(how.slabs * ((args.codes + kCodes - 1) / kCodes), 0, [&](int64_t task, void*) {
    const int64_t begin = task / how.slabs * kCodes;
    body.add_tables(args, at(task % how.slabs, 0, begin, begin + kCodes), how.row_parts, how.slabs * table);
  });
}

// the same from the sort
inline void sum_sorted(const CodeSumsKernels& body, Sums args, const ByCode& by_code) {
  const int64_t d = args.x.features;
  // rows that lie across are read once as they are, not once for every code
  const bool turned = std::abs(args.x.stride_feature) > std::abs(args.x.stride_inner) && d > 1;
  const auto together = memory<char>(turned ? args.x.count() * d * (args.wide ? 8 : 4) : 0);
  if (turned) {
    const int64_t count = args.x.count();
    constexpr int64_t kRows = 1024;
    each_task((count + kRows - 1) / kRows, 0, [&](int64_t task, void*) {
      body.copy(args.x, task * kRows, std::min(count, (task + 1) * kRows), args.wide, together.get());
    });
    args.x = Rows{together.get(), args.wide ? Type::f64 : Type::f32, 1, count, d, 0, d, 1};
  }
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
