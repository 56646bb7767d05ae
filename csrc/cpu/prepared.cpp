#include "prepared.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "far.h"
#include "parallel.h"

namespace vqk::cpu {
namespace {

// codes at a time in the passes over the codebook
constexpr int64_t kCodes = 512;
// of so many codes one may be far
constexpr int64_t kFarShare = 16;
// codes that the centre is taken from
constexpr int64_t kSample = 128;

constexpr int kParts = Prepared::kParts;
enum Part { kRows, kKinds, kCentre, kPacked, kHalfNorms, kAbsent, kFarCodes, kNumbers };
static_assert(kNumbers + 1 == kParts);
enum Number {
  kTile,
  kCentred,
  kFirst,
  kReach,
  kScale,
  kRowScale,
  kPackedNorm,
  kResidual,
  kFarCount,
  kFarReach,
  kNumberCount
};

int64_t padded_features(int64_t features) { return (features + 15) / 16 * 16; }

int64_t tiles_of(const NearestCodeKernels& body, int64_t codes) {
  return (codes + body.codes - 1) / body.codes;
}

bool usable_in_place(const Rows& codebook) {
  const bool contiguous =
      codebook.stride_inner == codebook.features && (codebook.stride_feature == 1 || codebook.features == 1);
  return contiguous && (codebook.type == Type::f32 || codebook.type == Type::f64);
}

int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return 1;
    case ScalarType::Short: return 2;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    default: return 8;
  }
}

// how many elements of each part a codebook needs, and of which type
struct Layout {
  int64_t sizes[kParts];
  ScalarType types[kParts];

  Layout(const NearestCodeKernels& body, const Rows& codebook, bool dithered) {
    const int64_t d = codebook.features, k = dithered ? codebook.inner - 1 : codebook.inner,
                  tiles = tiles_of(body, k);
    const auto set = [&](Part part, int64_t size, ScalarType type) {
      sizes[part] = size, types[part] = type;
    };
    set(kRows, !dithered && usable_in_place(codebook) ? 0 : k * d,
        dithered || codebook.type == Type::f64 ? ScalarType::Double : ScalarType::Float);
    set(kKinds, k, ScalarType::Byte);
    set(kCentre, padded_features(d), ScalarType::Double);
    // scores of one row read a vector where a tile has fewer codes
    set(kPacked, tiles * body.codes * ((d + 1) / 2) + 16, ScalarType::Int);
    set(kHalfNorms, tiles * body.codes + 16, ScalarType::Int);
    set(kAbsent, tiles, ScalarType::Short);
    set(kFarCodes, k / kFarShare, ScalarType::Long);
    set(kNumbers, kNumberCount, ScalarType::Double);
  }

  // from group to group; each begins where a line of the caches does
  int64_t step(int part, int64_t groups) const {
    return groups > 1 ? (sizes[part] + 63) / 64 * 64 : sizes[part];
  }
};

}  // namespace

Prepared::Prepared(const NearestCodeKernels& body, const Tensor& codebook) {
  *this = std::move(of_groups(body, codebook, MaybeTensor(), 1).front());
}

std::vector<Prepared> Prepared::of_groups(const NearestCodeKernels& body, const Tensor& codebook,
                                          const MaybeTensor& dither, int64_t groups) {
  const bool grouped = codebook.dim() == 3;
  const Rows codes = rows_of(codebook, true, grouped),
             weights = dither ? rows_of(*dither, false, grouped) : no_rows();
  const Layout layout(body, codes, dither.has_value());
  std::vector<Tensor> parts;
  parts.reserve(kParts);
  for (int part = 0; part < kParts; ++part)
    parts.push_back(
        torch::stable::new_empty(codebook, {groups * layout.step(part, groups)}, layout.types[part]));
  std::vector<Prepared> made(static_cast<size_t>(groups));
  for (int64_t g = 0; g < groups; ++g)
    for (int part = 0; part < kParts; ++part)
      made[static_cast<size_t>(g)].base[part] = static_cast<char*>(parts[part].mutable_data_ptr()) +
                                                g * layout.step(part, groups) * bytes_of(layout.types[part]);
  made.front().parts = std::move(parts);
  const auto make = [&](int64_t g, void*) {
    made[static_cast<size_t>(g)].make(body, group_of(codes, codebook, g),
                                      dither ? group_of(weights, *dither, g) : weights);
  };
  // threads share groups, or the codes of each where that keeps more of them busy
  const int64_t threads = torch::stable::get_num_threads();
  if (groups >= std::min(threads, (codes.inner + kCodes - 1) / kCodes))
    each_task(groups, 0, make);
  else
    for (int64_t g = 0; g < groups; ++g) make(g, nullptr);
  return made;
}

Prepared::Prepared(const NearestCodeKernels& body, const Tensor& codebook, std::vector<Tensor> kept) {
  const Rows rows = rows_of(codebook);
  const Layout layout(body, rows, false);
  const bool whole = kept.size() == kParts && kept[kNumbers].scalar_type() == ScalarType::Double &&
                     kept[kNumbers].numel() == kNumberCount;
  const bool ours = whole && static_cast<const double*>(kept[kNumbers].const_data_ptr())[kTile] == body.codes;
  if (whole && !ours) {
    *this = Prepared(body, codebook);
    return;
  }
  bool fits = whole;
  for (int part = 0; fits && part < kParts; ++part)
    fits = kept[part].numel() == layout.sizes[part] && kept[part].scalar_type() == layout.types[part] &&
           kept[part].is_contiguous();
  STD_TORCH_CHECK(fits,
                  "nearest_code: parts must be what prepare made of this codebook; got others. Call "
                  "prepare(codebook) again.");
  parts = std::move(kept);
  for (int part = 0; part < kParts; ++part) base[part] = parts[part].mutable_data_ptr();
  codes.count = rows.inner;
  codes.features = rows.features;
  codes.wide = rows.type == Type::f64;
  codes.rows = usable_in_place(rows) ? rows.data : base[kRows];
  point();
  const double* const n = memory_of<double>(kNumbers);
  codes.centred = n[kCentred] != 0;
  codes.first_finite = static_cast<int64_t>(n[kFirst]);
  codes.reach = n[kReach];
  codes.scale = n[kScale];
  codes.row_scale = n[kRowScale];
  codes.packed_norm = n[kPackedNorm];
  codes.residual = n[kResidual];
  codes.far_count = static_cast<int64_t>(n[kFarCount]);
  codes.far_reach = n[kFarReach];
}

void Prepared::point() {
  codes.kinds = memory_of<uint8_t>(kKinds);
  codes.centre = memory_of<double>(kCentre);
  codes.packed = memory_of<int32_t>(kPacked);
  codes.half_norms = memory_of<int32_t>(kHalfNorms);
  codes.absent = memory_of<uint16_t>(kAbsent);
  codes.far = memory_of<int64_t>(kFarCodes);
}

void Prepared::make(const NearestCodeKernels& body, const Rows& codebook, const Rows& dither) {
  const int64_t d = codebook.features, k = dither.data ? codebook.inner - 1 : codebook.inner,
                tiles = tiles_of(body, k), chunks = (k + kCodes - 1) / kCodes;
  codes.count = k;
  codes.features = d;
  codes.wide = dither.data || codebook.type == Type::f64;
  point();
  const bool in_place = !dither.data && usable_in_place(codebook);
  codes.rows = in_place ? codebook.data : base[kRows];
  if (!in_place)
    each_task(chunks, 0, [&](int64_t task, void*) {
      body.points(codebook, dither, task * kCodes, std::min(k, (task + 1) * kCodes), codes.wide, base[kRows]);
    });
  find_centre();

  const auto hashes = memory<int64_t>(k);
  const auto norms = memory<double>(k);
  std::vector<Spread> spreads(static_cast<size_t>(chunks));
  each_task(chunks, 0, [&](int64_t task, void*) {
    body.survey(codes, task * kCodes, std::min(k, (task + 1) * kCodes), hashes.get(), norms.get(),
                &spreads[static_cast<size_t>(task)]);
  });
  double largest = 0;
  for (const Spread& spread : spreads) largest = std::max(largest, spread.largest);
  codes.first_finite = std::find(codes.kinds, codes.kinds + k, kUsual) - codes.kinds;
  if (codes.first_finite == k) codes.first_finite = -1;
  drop_repeated(hashes.get());
  set_apart(norms.get());
  body.scale(&codes, std::min(largest, codes.reach));

  const int64_t at_once = kCodes / body.codes, packs = (tiles + at_once - 1) / at_once;
  spreads.assign(static_cast<size_t>(packs), Spread{});
  std::fill_n(codes.packed + tiles * body.codes * ((d + 1) / 2), 16, 0);
  std::fill_n(codes.half_norms + tiles * body.codes, 16, 0);
  each_task(packs, 0, [&](int64_t task, void*) {
    body.pack(codes, task * at_once, std::min(tiles, (task + 1) * at_once),
              &spreads[static_cast<size_t>(task)]);
  });
  for (const Spread& spread : spreads) {
    // written so that a NaN stays
    codes.packed_norm = spread.packed_norm <= codes.packed_norm ? codes.packed_norm : spread.packed_norm;
    codes.residual = spread.residual <= codes.residual ? codes.residual : spread.residual;
  }
  double* const n = memory_of<double>(kNumbers);
  n[kTile] = body.codes;
  n[kCentred] = codes.centred;
  n[kFirst] = static_cast<double>(codes.first_finite);
  n[kReach] = codes.reach;
  n[kScale] = codes.scale;
  n[kRowScale] = codes.row_scale;
  n[kPackedNorm] = codes.packed_norm;
  n[kResidual] = codes.residual;
  n[kFarCount] = static_cast<double>(codes.far_count);
  n[kFarReach] = codes.far_reach;
}

// the mean of some codes where it outweighs their spread, else 0: any centre is right, a good one makes
// scores small beside their differences
void Prepared::find_centre() {
  const int64_t d = codes.features, step = std::max<int64_t>(1, codes.count / kSample);
  double* const centre = memory_of<double>(kCentre);
  std::fill_n(centre, padded_features(d), 0.0);
  const auto value = [&](int64_t j, int64_t f) {
    const int64_t n = j * d + f;
    return codes.wide ? static_cast<const double*>(codes.rows)[n]
                      : static_cast<double>(static_cast<const float*>(codes.rows)[n]);
  };
  std::vector<double> sum(static_cast<size_t>(d), 0.0), sizes;
  std::vector<std::pair<int64_t, double>> sample;
  for (int64_t j = 0; j < codes.count; j += step) {
    double square = 0;
    for (int64_t f = 0; f < d; ++f) square += value(j, f) * value(j, f);
    if (!std::isfinite(square)) continue;
    sample.emplace_back(j, square);
    sizes.push_back(square);
  }
  if (sample.empty()) return;
  const auto middle = sizes.begin() + static_cast<int64_t>(sizes.size() / 2);
  std::nth_element(sizes.begin(), middle, sizes.end());
  double squares = 0, count = 0;
  for (const auto& [j, square] : sample) {
    // one code far from the rest must not carry the centre away from them
    if (square > kFarRatio * kFarRatio * *middle) continue;
    for (int64_t f = 0; f < d; ++f) sum[static_cast<size_t>(f)] += value(j, f);
    squares += square;
    count += 1;
  }
  double square = 0;
  for (double& v : sum) v /= count, square += v * v;
  codes.centred = count > 0 && square > 0.75 * squares / count;
  if (codes.centred) std::copy(sum.begin(), sum.end(), centre);
}

// of equal codes only the first can win; the others would hide each other from the certificate
void Prepared::drop_repeated(const int64_t* hashes) {
  const int64_t k = codes.count, d = codes.features;
  // a matter of speed alone, and beyond the caches a look at the table costs more than it saves
  if (k > 1 << 20) return;
  int64_t places = 64;
  while (places < 2 * k) places *= 2;
  const auto table = memory<int32_t>(places);
  std::fill_n(table.get(), places, -1);
  const auto equal = [&](int64_t a, int64_t b) {
    // by value: 0 and -0 are one
    if (codes.wide) {
      const double* const c = static_cast<const double*>(codes.rows);
      return std::equal(c + a * d, c + (a + 1) * d, c + b * d);
    }
    const float* const c = static_cast<const float*>(codes.rows);
    return std::equal(c + a * d, c + (a + 1) * d, c + b * d);
  };
  for (int64_t j = 0; j < k; ++j) {
    if (codes.kinds[j] == kNever) continue;
    int64_t at = hashes[j] & (places - 1);
    while (table[at] >= 0 && !(hashes[table[at]] == hashes[j] && equal(table[at], j)))
      at = (at + 1) & (places - 1);
    if (table[at] >= 0)
      codes.kinds[j] = kNever;
    else
      table[at] = static_cast<int32_t>(j);
  }
}

// a few codes much longer than the rest would leave the rest no precision
void Prepared::set_apart(const double* norms) {
  std::vector<double> usual;
  for (int64_t j = 0; j < codes.count; ++j)
    if (codes.kinds[j] == kUsual) usual.push_back(norms[j]);
  if (usual.empty()) return;
  codes.reach = *std::max_element(usual.begin(), usual.end());
  const double longest = far_beyond(usual, kFarShare);
  if (!(codes.reach > longest)) return;
  int64_t* const far = memory_of<int64_t>(kFarCodes);
  codes.reach = 0;
  codes.far_reach = HUGE_VAL;
  for (int64_t j = 0; j < codes.count; ++j) {
    if (codes.kinds[j] != kUsual) continue;
    if (norms[j] > longest) {
      codes.kinds[j] = kFar;
      far[codes.far_count++] = j;
      // norms are rounded up
      codes.far_reach = std::min(codes.far_reach, norms[j] * (1 - 1e-6));
    } else {
      codes.reach = std::max(codes.reach, norms[j]);
    }
  }
}

}  // namespace vqk::cpu
