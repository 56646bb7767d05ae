#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "far.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace vqk::cpu {
namespace {

// codes at a time in the passes over the codebook
constexpr int64_t kCodes = 512;
// codes that are looked at for their mean
constexpr int64_t kSampled = 512;
// of so many codes one may be far
constexpr int64_t kFarShare = 64;
// rows and what is remembered of them stay in the second cache
constexpr int64_t kBlockBytes = 3 << 17, kMemoBytes = 208, kMostRows = 1024;
// open rows at a time
constexpr int64_t kMostOpen = 64;

int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// the polyline as its search wants it, and the memory it lives in
struct PackedLine {
  Polyline line{};
  PolylineSpread spread{};

  PackedLine(const NearestSegmentKernels& body, const Rows& codebook) {
    const int64_t d = codebook.features, k = codebook.inner;
    line.count = k;
    line.features = d;
    take_rows(body, codebook);
    find_centre();
    kinds_ = memory<uint8_t>(k);
    line.kinds = kinds_.get();
    survey(body);

    const int64_t tiles = k / body.nodes + 1, at_once = std::max<int64_t>(1, kCodes / body.nodes);
    // the last vector of a tile may be read beyond its end
    const int64_t beyond = 16;
    packed_ = memory<float>(tiles * (body.nodes + 1) * d + beyond);
    bias_ = memory<float>(tiles * (body.nodes + 1) + beyond);
    bends_ = memory<float>(tiles * 3 * body.nodes + beyond);
    length_ = memory<double>(k - 1);
    std::fill_n(packed_.get() + tiles * (body.nodes + 1) * d, beyond, 0.0f);
    std::fill_n(bias_.get() + tiles * (body.nodes + 1), beyond, 0.0f);
    std::fill_n(bends_.get() + tiles * 3 * body.nodes, beyond, 0.0f);
    line.packed = packed_.get();
    line.bias = bias_.get();
    line.bends = bends_.get();
    line.length = length_.get();
    std::vector<PolylineSpread> parts(static_cast<size_t>(parts_of(tiles, at_once)));
    each_task(parts_of(tiles, at_once), 0, [&](int64_t task, void*) {
      body.pack(line, task * at_once, std::min(tiles, (task + 1) * at_once),
                &parts[static_cast<size_t>(task)]);
    });
    // written so that a NaN stays
    const auto grow = [](double& most, double v) { most = v <= most ? most : v; };
    for (const PolylineSpread& part : parts) {
      grow(spread.norm, part.norm);
      grow(spread.residual, part.residual);
      grow(spread.far, part.far);
      grow(spread.half_length, part.half_length);
    }
  }

 private:
  Memory<char> rows_;
  Memory<double> centre_, length_;
  Memory<uint8_t> kinds_;
  Memory<float> packed_, bias_, bends_;
  std::vector<int64_t> apart_;

  void take_rows(const NearestSegmentKernels& body, const Rows& codebook) {
    const int64_t d = line.features, k = line.count;
    line.wide = codebook.type == Type::f64;
    const bool contiguous = codebook.stride_inner == d && (codebook.stride_feature == 1 || d == 1);
    if (contiguous && (line.wide || codebook.type == Type::f32)) {
      line.rows = codebook.data;
      return;
    }
    rows_ = memory<char>(k * d * (line.wide ? 8 : 4));
    each_task(parts_of(k, kCodes), 0, [&](int64_t task, void*) {
      body.copy(codebook, task * kCodes, std::min(k, (task + 1) * kCodes), line.wide, rows_.get());
    });
    line.rows = rows_.get();
  }

  double at(int64_t j, int64_t f) const {
    const int64_t n = j * line.features + f;
    return line.wide ? static_cast<const double*>(line.rows)[n]
                     : static_cast<double>(static_cast<const float*>(line.rows)[n]);
  }

  // any centre is right; the mean of the codes is a good one where it is most of what they are
  void find_centre() {
    const int64_t d = line.features, length = parts_of(d, 8) * 8;
    centre_ = memory<double>(length);
    line.centre = centre_.get();
    std::fill_n(centre_.get(), length, 0.0);
    std::vector<double> mean(static_cast<size_t>(d), 0.0), norms;
    std::vector<int64_t> sampled;
    for (int64_t j = 0; j < line.count; j += parts_of(line.count, kSampled)) {
      // sums side by side hide each other's latency
      double sums[8] = {}, square = 0;
      for (int64_t f = 0; f < d; ++f) sums[f % 8] += at(j, f) * at(j, f);
      for (const double sum : sums) square += sum;
      if (!std::isfinite(square)) continue;
      sampled.push_back(j);
      norms.push_back(std::sqrt(square));
    }
    const double beyond = far_beyond(norms, kFarShare);
    double squares = 0, used = 0;
    for (size_t n = 0; n < sampled.size(); ++n) {
      if (norms[n] > beyond) continue;
      const int64_t j = sampled[n];
      used += 1;
      squares += norms[n] * norms[n];
      for (int64_t f = 0; f < d; ++f) mean[static_cast<size_t>(f)] += at(j, f);
    }
    double square = 0;
    for (double& v : mean) {
      v = used > 0 ? v / used : 0;
      square += v * v;
    }
    if (2 * used * square > squares) std::copy(mean.begin(), mean.end(), centre_.get());
  }

  void survey(const NearestSegmentKernels& body) {
    const int64_t k = line.count, tasks = parts_of(k, kCodes);
    const auto norms = memory<double>(k);
    each_task(tasks, 0, [&](int64_t task, void*) {
      body.survey(line, task * kCodes, std::min(k, (task + 1) * kCodes), norms.get());
    });
    line.first_usable = -1;
    for (int64_t s = 0; s + 1 < k && line.first_usable < 0; ++s)
      if (line.kinds[s] != kNever && line.kinds[s + 1] != kNever) line.first_usable = s;
    const double reach = set_apart(norms.get());
    // beyond these powers float64 itself leaves its normal range
    if (reach > 0) line.exponent = std::clamp(-std::ilogb(reach), -1000, 1000);
    line.scale = std::ldexp(1.0, line.exponent);
  }

  // a few codes much longer than the rest would leave the rest no precision; the norm of the longest left
  double set_apart(const double* norms) {
    std::vector<double> finite;
    for (int64_t j = 0; j < line.count; ++j)
      if (line.kinds[j] == kUsual) finite.push_back(norms[j]);
    const double beyond = far_beyond(std::move(finite), kFarShare);
    double reach = 0;
    for (int64_t j = 0; j < line.count; ++j) {
      if (line.kinds[j] != kUsual) continue;
      if (norms[j] > beyond)
        line.kinds[j] = kFar;
      else
        reach = std::max(reach, norms[j]);
    }
    for (int64_t s = 0; s + 1 < line.count; ++s) {
      const bool usable = line.kinds[s] != kNever && line.kinds[s + 1] != kNever;
      if (usable && (line.kinds[s] == kFar || line.kinds[s + 1] == kFar)) apart_.push_back(s);
    }
    line.apart = apart_.data();
    line.apart_count = static_cast<int64_t>(apart_.size());
    return reach;
  }
};

void fill(const SegmentSearch& search, int64_t count) {
  const auto both = [&](auto* position, auto* sq_dist, auto nan) {
    std::fill_n(position, count, decltype(nan){0});
    std::fill_n(sq_dist, count, nan);
  };
  std::fill_n(search.segments, count, 0);
  if (search.wide)
    both(static_cast<double*>(search.position), static_cast<double*>(search.sq_dist), std::nan(""));
  else
    both(static_cast<float*>(search.position), static_cast<float*>(search.sq_dist), std::nanf(""));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> nearest_segment(Tensor x, Tensor codebook) {
  const NearestSegmentKernels& body = *kernels().nearest_segment;
  const Rows rows = rows_of(x), codes = rows_of(codebook);
  check_pair(rows, codes, 2);
  const int64_t count = rows.count(), d = rows.features;
  const ScalarType type = distance_type(rows, codes);
  Tensor segments = torch::stable::new_empty(x, {rows.batch, rows.inner}, ScalarType::Long);
  Tensor position = torch::stable::new_empty(x, {rows.batch, rows.inner}, type);
  Tensor sq_dist = torch::stable::new_empty(x, {rows.batch, rows.inner}, type);
  if (count == 0) return {segments, position, sq_dist};

  const PackedLine packed(body, codes);
  const SegmentSearch search{rows,
                             packed.line,
                             packed.spread,
                             segments.mutable_data_ptr<int64_t>(),
                             position.mutable_data_ptr(),
                             sq_dist.mutable_data_ptr(),
                             type == ScalarType::Double};
  if (packed.line.first_usable < 0) {
    fill(search, count);
    return {segments, position, sq_dist};
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fitting = std::clamp<int64_t>(kBlockBytes / (4 * d + kMemoBytes), 1, kMostRows);
  const int64_t fair = parts_of(count, 4 * threads);
  const int64_t block = parts_of(std::min(fitting, fair), body.rows) * body.rows;
  each_task(parts_of(count, block), body.search_scratch(d, block), [&](int64_t task, void* scratch) {
    body.search(search, task * block, std::min(count, (task + 1) * block), scratch);
  });

  std::vector<int64_t> open;
  for (int64_t n = 0; n < count; ++n)
    if (search.segments[n] < 0) open.push_back(n);
  const int64_t left = static_cast<int64_t>(open.size());
  // many rows share what it takes to lay out the codes, few are shared by the threads
  const int64_t batch = std::clamp<int64_t>(parts_of(left, 2 * threads), 1, kMostOpen);
  each_task(parts_of(left, batch), body.rescore_scratch(d, batch), [&](int64_t task, void* scratch) {
    body.rescore(search, open.data() + task * batch, std::min(batch, left - task * batch), scratch);
  });
  return {segments, position, sq_dist};
}

}  // namespace vqk::cpu
