#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "prepared.h"

namespace vqk::cpu {
namespace {

// bytes of packed codes, and of a block of rows, that the second cache holds side by side
int64_t cache_share() {
  static const int64_t share = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    const int64_t bytes = 0;
#endif
    return std::clamp<int64_t>(bytes > 0 ? bytes : 1 << 19, 1 << 18, 1 << 22) / 3;
  }();
  return share;
}

void fill(const Search& search, int64_t count) {
  std::fill_n(search.indices, count, 0);
  if (search.wide)
    std::fill_n(static_cast<double*>(search.sq_dist), count, std::nan(""));
  else
    std::fill_n(static_cast<float*>(search.sq_dist), count, std::nanf(""));
}

// rows are shared out over the threads, and where they are few the codes as well; neither changes a result.
// Returns how many rows stay open.
int64_t search_all(const NearestCodeKernels& body, const Search& search, int64_t count, int64_t threads) {
  const int64_t d = search.x.features, tiles = (search.codes.count + body.codes - 1) / body.codes;
  // rows that stay in the second cache beside a chunk of codes, and enough blocks for every thread
  const int64_t fitting = std::clamp<int64_t>(cache_share() / (6 * d + 256), 1, 512);
  const int64_t fair = (count + 4 * threads - 1) / (4 * threads);
  const int64_t block = (std::min(fitting, fair) + body.rows - 1) / body.rows * body.rows;
  const int64_t blocks = (count + block - 1) / block;
  const auto end_of = [&](int64_t at) { return std::min(count, (at + 1) * block); };
  // tiles that are worth a task
  constexpr int64_t kTiles = 64;
  const int64_t parts = std::min(2 * threads / blocks, tiles / kTiles);
  const size_t size = body.search_scratch(search, block);
  std::atomic<int64_t> open{0};
  if (parts < 2 || threads == 1) {
    each_task(blocks, size, [&](int64_t at, void* scratch) {
      body.pack_rows(search, at * block, end_of(at), scratch);
      body.scores(search, end_of(at) - at * block, scratch, 0, tiles, nullptr);
      open += body.settle(search, at * block, end_of(at), scratch, nullptr, 0);
    });
    return open;
  }
  const int64_t padded = static_cast<int64_t>(size + 63) / 64 * 64,
                slots = static_cast<int64_t>(body.slots_size(block));
  const auto scratches = memory<char>(blocks * padded), found = memory<char>(blocks * parts * slots);
  each_task(blocks, 0, [&](int64_t at, void*) {
    body.pack_rows(search, at * block, end_of(at), scratches.get() + at * padded);
  });
  each_task(blocks * parts, 0, [&](int64_t task, void*) {
    const int64_t at = task / parts, part = task % parts;
    body.scores(search, end_of(at) - at * block, scratches.get() + at * padded, tiles * part / parts,
                tiles * (part + 1) / parts,
                found.get() + at * parts * slots +
                    part * static_cast<int64_t>(body.slots_size(end_of(at) - at * block)));
  });
  each_task(blocks, 0, [&](int64_t at, void*) {
    open += body.settle(search, at * block, end_of(at), scratches.get() + at * padded,
                        found.get() + at * parts * slots, parts);
  });
  return open;
}

}  // namespace

std::vector<Tensor> prepare_codes(Tensor codebook, ScalarType) {
  const Rows rows = rows_of(codebook);
  check_pair(rows, rows, 1);
  return Prepared(*kernels().nearest_code, codebook, no_rows()).parts;
}

std::tuple<Tensor, Tensor> nearest_code(Tensor x, Tensor codebook, MaybeTensor dither, bool exact,
                                        std::vector<Tensor> parts) {
  const NearestCodeKernels& body = *kernels().nearest_code;
  const Rows rows = rows_of(x), codes = rows_of(codebook),
             weights = dither ? rows_of(*dither, false) : no_rows();
  check_pair(rows, codes, dither ? 2 : 1);
  STD_TORCH_CHECK(!dither || weights.inner == codes.inner - 1,
                  "native: dither must be (K - 1,); got another shape. Pass one weight per segment.");
  const int64_t count = rows.count();
  const ScalarType type = distance_type(rows, codes);
  Tensor indices = torch::stable::new_empty(x, {rows.batch, rows.inner}, ScalarType::Long);
  Tensor sq_dist = torch::stable::new_empty(x, {rows.batch, rows.inner}, type);
  if (count == 0) return {indices, sq_dist};

  STD_TORCH_CHECK(parts.empty() || !dither,
                  "nearest_code: parts must be empty with a dither; got some. Pass the codebook itself.");
  const Prepared prepared =
      parts.empty() ? Prepared(body, codebook, weights) : Prepared(body, codebook, std::move(parts));
  const int64_t threads = torch::stable::get_num_threads(), d = rows.features;
  const int64_t tile_bytes = (d + 1) / 2 * 4 * body.codes;
  Search search{rows,
                prepared.codes,
                exact,
                std::max<int64_t>(1, cache_share() / tile_bytes),
                indices.mutable_data_ptr<int64_t>(),
                sq_dist.mutable_data_ptr(),
                type == ScalarType::Double};
  if (prepared.codes.first_finite < 0) {
    fill(search, count);
    return {indices, sq_dist};
  }
  if (search_all(body, search, count, threads) == 0) return {indices, sq_dist};

  std::vector<int64_t> open;
  for (int64_t n = 0; n < count; ++n)
    if (search.indices[n] < 0) open.push_back(n);
  const int64_t left = static_cast<int64_t>(open.size());
  const int64_t batch = std::clamp<int64_t>((left + 2 * threads - 1) / (2 * threads), 2, 64);
  each_task((left + batch - 1) / batch, body.rescore_scratch(d, batch), [&](int64_t task, void* scratch) {
    body.rescore(search, open.data() + task * batch, std::min(batch, left - task * batch), scratch);
  });
  return {indices, sq_dist};
}

}  // namespace vqk::cpu
