// Sums of rows per code over entries sorted by code. A chunk is a fixed number of entries, so the order of
// the sum depends on the data alone and not on the threads.
#include "../kernels.h"
#include "convert.h"

namespace vqk {
namespace {

size_t scratch_of(int64_t d) { return (size_t)(3 * d * 8); }

void drop_non_finite(const Rows& x, int64_t begin, int64_t end, void* scratch, int64_t* codes) {
  double* const row = (double*)scratch;
  for (int64_t n = begin; n < end; ++n) {
    load(x, n, 1, row, x.features);
    if (!finite(row, x.features)) codes[n] = -1;
  }
}

void add(const double* row, int64_t d, double* total) {
  for (int64_t k = 0; k < d; ++k) total[k] += row[k];
}

// the pull along e = c - x, formed as in the forward pass
template <class A>
void pull(const A* x, const A* c, double a, int64_t d, double* total) {
  for (int64_t k = 0; k < d; ++k) total[k] += a * (double)(c[k] - x[k]);
}

template <class A>
void sums_of(const Sums& args, int64_t chunk, void* scratch) {
  const int64_t d = args.x.features, count = args.x.count(), last = args.starts[args.codes];
  const int64_t begin = chunk * args.chunk, end = smaller(begin + args.chunk, last);
  double* const total = (double*)scratch;
  A* const row = (A*)(total + d);
  A* const code = (A*)(total + 2 * d);
  // the code of the first entry: the last code that starts at or before it
  int64_t low = 0, high = args.codes;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (args.starts[middle] <= begin ? low : high) = middle;
  }
  for (int64_t at = begin, j = low; at < end; ++j) {
    const int64_t stop = smaller(args.starts[j + 1], end);
    if (stop <= at) continue;
    const int64_t from = at;
    memset(total, 0, (size_t)d * 8);
    if (args.codebook.data) load(args.codebook, j, 1, code, d);
    for (; at < stop; ++at) {
      const int64_t entry = args.entries[at];
      load(args.x, entry % count, 1, row, d);
      if (args.codebook.data)
        pull(row, code, args.pull[entry], d, total);
      else
        for (int64_t k = 0; k < d; ++k) total[k] += (double)row[k];
    }
    // a code that goes on in another chunk is finished by whoever joins the edges
    if (from > args.starts[j])
      memcpy(args.edges + 2 * chunk * d, total, (size_t)d * 8);
    else if (stop < args.starts[j + 1])
      memcpy(args.edges + (2 * chunk + 1) * d, total, (size_t)d * 8);
    else
      store(total, d, args.out, j, 1);
  }
}

// one more task than chunks: it joins the edges in order
void join(const Sums& args, void* scratch) {
  const int64_t d = args.x.features;
  double* const total = (double*)scratch;
  for (int64_t j = 0; j < args.codes; ++j) {
    const int64_t from = args.starts[j], to = args.starts[j + 1];
    if (to == from) {
      memset(total, 0, (size_t)d * 8);
      store(total, d, args.out, j, 1);
      continue;
    }
    const int64_t first = from / args.chunk, final = (to - 1) / args.chunk;
    if (first == final) continue;
    memcpy(total, args.edges + (2 * first + 1) * d, (size_t)d * 8);
    for (int64_t chunk = first + 1; chunk <= final; ++chunk) add(args.edges + 2 * chunk * d, d, total);
    store(total, d, args.out, j, 1);
  }
}

void sums(const Sums& args, int64_t chunk, void* scratch) {
  if (chunk < 0) return join(args, scratch);
  return args.wide || !args.codebook.data ? sums_of<double>(args, chunk, scratch)
                                          : sums_of<float>(args, chunk, scratch);
}

}  // namespace

namespace VQK_ISA {
extern const CodeSumsKernels code_sums;
const CodeSumsKernels code_sums = {scratch_of, drop_non_finite, sums};
}  // namespace VQK_ISA

}  // namespace vqk
