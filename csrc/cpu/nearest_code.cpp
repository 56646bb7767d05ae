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

// rows of all groups are shared out over the threads, and where they are few the codes as well; neither
// changes a result. Returns how many rows of each group stay open.
std::vector<std::atomic<int64_t>> search_all(const NearestCodeKernels& body,
                                             const std::vector<Search>& groups, int64_t threads) {
  const Search& any = groups.front();
  const int64_t count = any.x.count(), d = any.x.features,
                tiles = (any.codes.count + body.codes - 1) / body.codes;
  const auto number = static_cast<int64_t>(groups.size());
  // rows that stay in the second cache beside a chunk of codes, and enough blocks for every thread
  const int64_t fitting = std::clamp<int64_t>(cache_share() / (6 * d + 256), 1, 512);
  const int64_t fair = (number * count + 4 * threads - 1) / (4 * threads);
  const int64_t block = (std::min({fitting, fair, count}) + body.rows - 1) / body.rows * body.rows;
  const int64_t of_group = (count + block - 1) / block, blocks = number * of_group;
  const auto group_at = [&](int64_t at) { return static_cast<size_t>(at / of_group); };
  const auto begin_of = [&](int64_t at) { return at % of_group * block; };
  const auto end_of = [&](int64_t at) { return std::min(count, begin_of(at) + block); };
  // tiles that are worth a task
  constexpr int64_t kTiles = 64;
  const int64_t parts = std::min(2 * threads / blocks, tiles / kTiles);
  size_t size = 0;
  for (const Search& search : groups) size = std::max(size, body.search_scratch(search, block));
  std::vector<std::atomic<int64_t>> open(groups.size());
  if (parts < 2 || threads == 1) {
    each_task(blocks, size, [&](int64_t at, void* scratch) {
      const Search& search = groups[group_at(at)];
      body.pack_rows(search, begin_of(at), end_of(at), scratch);
      body.scores(search, end_of(at) - begin_of(at), scratch, 0, tiles, nullptr);
      open[group_at(at)] += body.settle(search, begin_of(at), end_of(at), scratch, nullptr, 0);
    });
    return open;
  }
  const int64_t padded = static_cast<int64_t>(size + 63) / 64 * 64,
                slots = static_cast<int64_t>(body.slots_size(block));
  const auto scratches = memory<char>(blocks * padded), found = memory<char>(blocks * parts * slots);
  each_task(blocks, 0, [&](int64_t at, void*) {
    body.pack_rows(groups[group_at(at)], begin_of(at), end_of(at), scratches.get() + at * padded);
  });
  each_task(blocks * parts, 0, [&](int64_t task, void*) {
    const int64_t at = task / parts, part = task % parts, rows = end_of(at) - begin_of(at);
    body.scores(groups[group_at(at)], rows, scratches.get() + at * padded, tiles * part / parts,
                tiles * (part + 1) / parts,
                found.get() + at * parts * slots + part * static_cast<int64_t>(body.slots_size(rows)));
  });
  each_task(blocks, 0, [&](int64_t at, void*) {
    open[group_at(at)] += body.settle(groups[group_at(at)], begin_of(at), end_of(at),
                                      scratches.get() + at * padded, found.get() + at * parts * slots, parts);
  });
  return open;
}

// what the certificate could not tell, against every code in float64
void rescore_open(const NearestCodeKernels& body, const std::vector<Search>& groups,
                  const std::vector<std::atomic<int64_t>>& open, int64_t threads) {
  int64_t left = 0;
  for (const auto& each : open) left += each;
  if (left == 0) return;
  struct Batch {
    const Search* search;
    int64_t begin, count;
  };
  const int64_t most = std::clamp<int64_t>((left + 2 * threads - 1) / (2 * threads), 2, 64);
  std::vector<int64_t> rows;
  std::vector<Batch> batches;
  rows.reserve(static_cast<size_t>(left));
  for (size_t g = 0; g < groups.size(); ++g) {
    if (open[g] == 0) continue;
    auto begin = static_cast<int64_t>(rows.size());
    for (int64_t n = 0, count = groups[g].x.count(); n < count; ++n)
      if (groups[g].indices[n] < 0) rows.push_back(n);
    for (const auto end = static_cast<int64_t>(rows.size()); begin < end; begin += most)
      batches.push_back({&groups[g], begin, std::min(most, end - begin)});
  }
  each_task(static_cast<int64_t>(batches.size()), body.rescore_scratch(groups.front().x.features, most),
            [&](int64_t task, void* scratch) {
              const Batch& batch = batches[static_cast<size_t>(task)];
              body.rescore(*batch.search, rows.data() + batch.begin, batch.count, scratch);
            });
}

}  // namespace

std::vector<Tensor> prepare_codes(Tensor codebook, ScalarType) {
  const Rows rows = rows_of(codebook);
  check_pair(rows, rows, 1);
  return Prepared(*kernels().nearest_code, codebook).parts;
}

std::tuple<Tensor, Tensor> nearest_code(Tensor x, Tensor codebook, MaybeTensor dither, bool exact,
                                        std::vector<Tensor> parts) {
  const NearestCodeKernels& body = *kernels().nearest_code;
  const bool grouped = codebook.dim() == 3;
  const int64_t groups = groups_of(x, codebook, dither);
  const Rows rows = rows_of(x, true, grouped), codes = rows_of(codebook, true, grouped),
             weights = dither ? rows_of(*dither, false, grouped) : no_rows();
  check_pair(rows, codes, dither ? 2 : 1);
  STD_TORCH_CHECK(!dither || weights.inner == codes.inner - 1,
                  "native: dither must be (K - 1,); got another shape. Pass one weight per segment.");
  const int64_t count = rows.count();
  const ScalarType type = distance_type(rows, codes);
  const auto leading = x.sizes().slice(0, static_cast<size_t>(x.dim() - 1));
  Tensor indices = torch::stable::new_empty(x, leading, ScalarType::Long);
  Tensor sq_dist = torch::stable::new_empty(x, leading, type);
  if (count == 0) return {indices, sq_dist};

  STD_TORCH_CHECK(parts.empty() || !dither,
                  "nearest_code: parts must be empty with a dither; got some. Pass the codebook itself.");
  STD_TORCH_CHECK(parts.empty() || !grouped,
                  "nearest_code: parts must be empty with groups; got some. Pass the codebook itself.");
  std::vector<Prepared> prepared;
  if (parts.empty())
    prepared = Prepared::of_groups(body, codebook, dither, groups);
  else
    prepared.push_back(Prepared(body, codebook, std::move(parts)));
  const int64_t threads = torch::stable::get_num_threads(), d = rows.features;
  const int64_t tile_bytes = (d + 1) / 2 * 4 * body.codes;
  const bool wide = type == ScalarType::Double;
  char* const distances = static_cast<char*>(sq_dist.mutable_data_ptr());
  std::vector<Search> searches;
  searches.reserve(prepared.size());
  for (int64_t g = 0; g < groups; ++g) {
    const Search search{group_of(rows, x, g),
                        prepared[static_cast<size_t>(g)].codes,
                        exact,
                        std::max<int64_t>(1, cache_share() / tile_bytes),
                        indices.mutable_data_ptr<int64_t>() + g * count,
                        distances + g * count * (wide ? 8 : 4),
                        wide};
    if (search.codes.first_finite < 0)
      fill(search, count);
    else
      searches.push_back(search);
  }
  if (!searches.empty()) rescore_open(body, searches, search_all(body, searches, threads), threads);
  return {indices, sq_dist};
}

}  // namespace vqk::cpu
