#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace vqk::cpu {
namespace {

// codes at a time in the passes over the codebook
constexpr int64_t kCodes = 512;

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

// the codebook as the search wants it, and the memory it lives in
struct Prepared {
  Codes codes{};
  Memory<char> rows;
  Memory<double> centre;
  Memory<uint8_t> finite;
  Memory<int32_t> packed, half_norms;
  Memory<uint16_t> absent;

  Prepared(const NearestCodeKernels& body, const Rows& codebook, const Rows& dither) {
    const int64_t d = codebook.features, k = dither.data ? codebook.inner - 1 : codebook.inner;
    codes.count = k;
    codes.features = d;
    take_rows(body, codebook, dither);
    finite = memory<uint8_t>(k);
    codes.finite = finite.get();
    find_centre();

    const int64_t chunks = (k + kCodes - 1) / kCodes;
    std::vector<Spread> parts(static_cast<size_t>(chunks));
    each_task(chunks, 0, [&](int64_t task, void*) {
      body.survey(codes, task * kCodes, std::min(k, (task + 1) * kCodes), &parts[static_cast<size_t>(task)]);
    });
    double largest = 0;
    for (const Spread& part : parts) {
      largest = std::max(largest, part.largest);
      codes.reach = std::max(codes.reach, part.reach);
    }
    codes.first_finite = std::find(finite.get(), finite.get() + k, 1) - finite.get();
    if (codes.first_finite == k) codes.first_finite = -1;
    body.scale(&codes, largest);

    const int64_t tiles = (k + body.codes - 1) / body.codes, at_once = kCodes / body.codes;
    // scores of one row read a vector where a tile has fewer codes
    packed = memory<int32_t>(tiles * body.codes * ((d + 1) / 2) + 16);
    half_norms = memory<int32_t>(tiles * body.codes + 16);
    absent = memory<uint16_t>(tiles);
    codes.packed = packed.get();
    codes.half_norms = half_norms.get();
    codes.absent = absent.get();
    parts.assign(static_cast<size_t>((tiles + at_once - 1) / at_once), Spread{});
    each_task(static_cast<int64_t>(parts.size()), 0, [&](int64_t task, void*) {
      body.pack(codes, task * at_once, std::min(tiles, (task + 1) * at_once),
                &parts[static_cast<size_t>(task)]);
    });
    for (const Spread& part : parts) {
      // written so that a NaN stays
      codes.packed_norm = part.packed_norm <= codes.packed_norm ? codes.packed_norm : part.packed_norm;
      codes.residual = part.residual <= codes.residual ? codes.residual : part.residual;
    }
  }

 private:
  void take_rows(const NearestCodeKernels& body, const Rows& codebook, const Rows& dither) {
    const int64_t d = codes.features, k = codes.count;
    codes.wide = dither.data || codebook.type == Type::f64;
    const bool contiguous = codebook.stride_inner == d && (codebook.stride_feature == 1 || d == 1);
    if (!dither.data && contiguous && (codes.wide || codebook.type == Type::f32)) {
      codes.rows = codebook.data;
      return;
    }
    rows = memory<char>(k * d * (codes.wide ? 8 : 4));
    each_task((k + kCodes - 1) / kCodes, 0, [&](int64_t task, void*) {
      body.points(codebook, dither, task * kCodes, std::min(k, (task + 1) * kCodes), codes.wide, rows.get());
    });
    codes.rows = rows.get();
  }

  double at(int64_t j, int64_t f) const {
    const int64_t n = j * codes.features + f;
    return codes.wide ? static_cast<const double*>(codes.rows)[n]
                      : static_cast<double>(static_cast<const float*>(codes.rows)[n]);
  }

  // the mean of some codes where it outweighs their spread, else 0: any centre is right, a good one makes
  // scores small beside their differences
  void find_centre() {
    const int64_t d = codes.features, step = std::max<int64_t>(1, codes.count / 512);
    const int64_t length = (d + 7) / 8 * 8;
    centre = memory<double>(length);
    codes.centre = centre.get();
    std::fill_n(centre.get(), length, 0.0);
    std::vector<double> sum(static_cast<size_t>(d), 0.0);
    double squares = 0, count = 0;
    for (int64_t j = 0; j < codes.count; j += step) {
      double square = 0;
      for (int64_t f = 0; f < d; ++f) square += at(j, f) * at(j, f);
      if (!std::isfinite(square)) continue;
      for (int64_t f = 0; f < d; ++f) sum[static_cast<size_t>(f)] += at(j, f);
      squares += square;
      count += 1;
    }
    double square = 0;
    for (double& v : sum) v /= count, square += v * v;
    codes.centred = count > 0 && square > 0.75 * squares / count;
    if (codes.centred) std::copy(sum.begin(), sum.end(), centre.get());
  }
};

void fill(const Search& search, int64_t count) {
  std::fill_n(search.indices, count, 0);
  if (search.wide)
    std::fill_n(static_cast<double*>(search.sq_dist), count, std::nan(""));
  else
    std::fill_n(static_cast<float*>(search.sq_dist), count, std::nanf(""));
}

}  // namespace

std::vector<Tensor> prepare_codes(Tensor, ScalarType) { return {}; }

std::tuple<Tensor, Tensor> nearest_code(Tensor x, Tensor codebook, MaybeTensor dither, bool exact,
                                        std::vector<Tensor>) {
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

  const Prepared prepared(body, codes, weights);
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
  // rows that stay in the second cache beside a chunk of codes, and enough blocks for every thread
  const int64_t fitting = std::clamp<int64_t>(cache_share() / (6 * d + 256), 1, 512);
  const int64_t fair = (count + 4 * threads - 1) / (4 * threads);
  const int64_t block = (std::min(fitting, fair) + body.rows - 1) / body.rows * body.rows;
  each_task((count + block - 1) / block, body.search_scratch(search, block),
            [&](int64_t task, void* scratch) {
              body.search(search, task * block, std::min(count, (task + 1) * block), scratch);
            });

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
