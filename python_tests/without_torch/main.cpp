// The CPU ops without torch, on 1 to 4 threads and from several callers at once, for ThreadSanitizer: every
// thread is one that it sees. Results must not differ by a bit. Exits 1 and says where they do.
#include <cstdio>
#include <functional>
#include <string>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "torch/csrc/stable/ops.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Results = std::vector<Tensor>;

struct Case {
  int64_t batch, inner, codes, features;
  ScalarType type, codes_type;
  bool channels_first;
};

const Case kCases[] = {
    {1, 1, 1, 1, ScalarType::Float, ScalarType::Float, false},
    {1, 500, 70, 17, ScalarType::Float, ScalarType::Float, false},
    {3, 111, 600, 5, ScalarType::Float, ScalarType::Float, true},
    {2, 90, 1100, 64, ScalarType::BFloat16, ScalarType::Float, true},
    {1, 150, 40, 130, ScalarType::Half, ScalarType::Half, false},
    {2, 130, 80, 20, ScalarType::Double, ScalarType::Double, true},
    {1, 1300, 3, 2, ScalarType::Float, ScalarType::BFloat16, false},
    // enough rows that they are sorted, and counted, by several threads
    {1, 20000, 70, 3, ScalarType::Float, ScalarType::Float, false},
    // enough beside codes that each thread adds up rows of its own
    {2, 10000, 70, 5, ScalarType::Float, ScalarType::Float, true},
};

uint64_t random(uint64_t& state) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

// multiples of 1/4 up to 2, so that ties are many and every dtype holds them
void put(const Tensor& t, int64_t at, double value) {
  const auto single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  switch (t.scalar_type()) {
    case ScalarType::Double: t.mutable_data_ptr<double>()[at] = value; break;
    case ScalarType::Float: t.mutable_data_ptr<float>()[at] = single; break;
    case ScalarType::BFloat16: t.mutable_data_ptr<uint16_t>()[at] = static_cast<uint16_t>(bits >> 16); break;
    default: {
      const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
      t.mutable_data_ptr<uint16_t>()[at] =
          static_cast<uint16_t>(rest == 0 ? sign : sign | ((rest >> 13) - (112 << 10)));
    }
  }
}

Tensor values(int64_t batch, int64_t inner, int64_t features, ScalarType type, bool channels_first,
              uint64_t seed, bool ragged) {
  std::vector<int64_t> sizes{batch, inner, features}, strides{inner * features, features, 1};
  if (channels_first) strides = {inner * features, 1, inner};
  Tensor t(sizes, strides, type);
  uint64_t state = seed * 0x9E3779B97F4A7C15ull + 1;
  for (int64_t at = 0; at < t.numel(); ++at) {
    const auto word = random(state);
    // ragged: a spread that leaves few ties, a mantissa of seven bits
    const double value =
        ragged ? static_cast<double>(word % 255) / 64 - 2 : static_cast<double>(word % 17) / 4 - 2;
    put(t, at, value);
  }
  return t;
}

Tensor codebook(const Case& c) {
  Tensor t = values(1, c.codes, c.features, c.codes_type, false, 7, true);
  const int64_t bytes = c.features * t.element_size();
  char* const data = t.mutable_data_ptr<char>();
  // duplicates near and far: rows that the search leaves open
  for (const int64_t apart : {int64_t{1}, int64_t{16}, int64_t{192}})
    for (int64_t j = 3; j + apart < c.codes; j += 37)
      std::memcpy(data + (j + apart) * bytes, data + j * bytes, bytes);
  Tensor flat({c.codes, c.features}, c.codes_type);
  std::memcpy(flat.data_ptr(), data, flat.bytes());
  return flat;
}

Tensor scalar(int64_t value) {
  Tensor t(std::vector<int64_t>{}, ScalarType::Long);
  *t.mutable_data_ptr<int64_t>() = value;
  return t;
}

Tensor number(float value) {
  Tensor t(std::vector<int64_t>{}, ScalarType::Float);
  *t.mutable_data_ptr<float>() = value;
  return t;
}

// every op on one set of inputs
Results run(const Case& c) {
  using namespace vqk::cpu;
  Tensor x = values(c.batch, c.inner, c.features, c.type, c.channels_first, 3, true);
  // one row with a nan
  if (c.inner > 8) std::memset(x.mutable_data_ptr<char>() + 5 * x.stride(1) * x.element_size(), 0xff, 8);
  const Tensor codes = codebook(c);
  const Tensor grid = values(c.batch, c.inner, c.features, c.type, c.channels_first, 4, false);
  const Tensor grad = values(c.batch, c.inner, c.features, c.type, c.channels_first, 5, true);
  Tensor indices({c.batch, c.inner}, ScalarType::Long), position({c.batch, c.inner}, ScalarType::Float);
  uint64_t state = 11;
  for (int64_t n = 0; n < c.batch * c.inner; ++n) {
    const auto word = random(state);
    // one code takes half of the rows, so that sums cross the borders of tasks; some rows are masked
    const auto code = static_cast<int64_t>(word % static_cast<uint64_t>(c.codes + 1)) - 1;
    indices.mutable_data_ptr<int64_t>()[n] = word >> 60 < 8 ? c.codes / 2 : code;
    position.mutable_data_ptr<float>()[n] = static_cast<float>(word % 5) / 4;
  }

  Results results;
  const auto keep = [&results](const auto&... each) { (results.push_back(each), ...); };
  const auto search = [&](const Tensor& rows, const vqk::MaybeTensor& dither, bool exact,
                          std::vector<Tensor> parts) {
    const auto [found, sq_dist] = nearest_code(rows, codes, dither, exact, std::move(parts));
    keep(found, sq_dist);
  };
  search(x, {}, true, {});
  search(grid, {}, true, {});
  search(x, {}, false, {});
  search(x, {}, true, prepare_codes(codes, c.type));
  if (c.codes > 1) {
    Tensor dither({c.codes - 1}, ScalarType::Float);
    for (int64_t s = 0; s < c.codes - 1; ++s)
      dither.mutable_data_ptr<float>()[s] = static_cast<float>(s % 9) / 8;
    search(x, dither, true, {});
  }
  // the rows of each batch in codes of their own, then in points of their curves; one thread per group, or
  // more
  Tensor books({c.batch, c.codes, c.features}, c.codes_type);
  const int64_t bytes = c.features * codes.element_size();
  for (int64_t row = 0; row < c.batch * c.codes; ++row)
    std::memcpy(books.mutable_data_ptr<char>() + row * bytes,
                codes.const_data_ptr<char>() + (row + row / c.codes) % c.codes * bytes,
                static_cast<size_t>(bytes));
  for (const bool curve : {false, true}) {
    if (curve && c.codes < 2) continue;
    Tensor weights({c.batch, c.codes - 1}, ScalarType::Float);
    for (int64_t s = 0; s < weights.numel(); ++s)
      weights.mutable_data_ptr<float>()[s] = static_cast<float>(s % 7) / 8;
    const auto [found, sq_dist] =
        nearest_code(x, books, curve ? vqk::MaybeTensor(weights) : vqk::MaybeTensor(), !curve, {});
    keep(found, sq_dist);
  }
  for (int64_t direction = 0; direction < 3; ++direction)
    for (const bool curve : {false, true}) {
      if (curve && c.codes < 2) continue;
      const vqk::MaybeTensor at = curve ? vqk::MaybeTensor(position) : vqk::MaybeTensor();
      keep(directional(x, codes, indices, at, scalar(9), direction, 0.03, 5));
      const auto [grad_x, grad_codes] =
          directional_backward(grad, x, codes, indices, at, scalar(9), direction, 0.03, 5);
      keep(grad_x, grad_codes);
    }
  {
    const auto [z, sq_dist, totals] = straight_through(x, codes, indices);
    keep(z, sq_dist, totals);
  }
  for (const bool rotation : {false, true})
    for (const bool need_x : {false, true}) {
      const double sync = rotation ? 0.5 : 0;
      const auto [grad_x, grad_codes] = straight_through_backward(grad, number(0.5), x, codes, indices,
                                                                  rotation, 0.25, 1, sync, need_x, true);
      keep(grad_x, grad_codes);
    }
  if (c.codes > 1)
    for (const Tensor& rows : {x, grid}) {
      const auto [segments, places, sq_dist] = nearest_segment(rows, codes);
      keep(segments, places, sq_dist);
    }
  const auto [counts, sums] = code_sums(x, indices, c.codes);
  const auto [words, normals] = philox(scalar(-3), 300, 37, 1, int64_t{1} << 33);
  keep(counts, sums, words, normals);
  return results;
}

bool same(const Results& a, const Results& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i].bytes() != b[i].bytes() || std::memcmp(a[i].data_ptr(), b[i].data_ptr(), a[i].bytes()) != 0)
      return false;
  return a.size() == b.size();
}

}  // namespace

int main() {
  int calls = 0;
  for (const std::string& isa : vqk::isas_supported()) {
    vqk::set_isa(isa);
    std::vector<Results> alone;
    for (const Case& c : kCases) {
      torch::stable::num_threads = 1;
      alone.push_back(run(c));
      for (int64_t threads = 2; threads <= 4; ++threads, ++calls) {
        torch::stable::num_threads = threads;
        if (same(alone.back(), run(c))) continue;
        std::printf("%s: K %ld, D %ld differs on %ld threads\n", isa.c_str(), c.codes, c.features, threads);
        return 1;
      }
    }
    // callers side by side, each with threads of its own, while another forces what is in use already
    std::atomic<int> wrong{0}, left{4};
    const auto caller = [&](size_t number) {
      torch::stable::num_threads = 1 + static_cast<int64_t>(number) % 3;
      for (size_t turn = 0; turn < std::size(kCases); ++turn) {
        const size_t which = (turn + number) % std::size(kCases);
        wrong += !same(alone[which], run(kCases[which]));
      }
      --left;
    };
    std::vector<std::thread> callers;
    for (size_t number = 0; number < 4; ++number) callers.emplace_back(caller, number);
    while (left > 0) {
      vqk::set_isa(isa);
      std::this_thread::yield();
    }
    for (std::thread& each : callers) each.join();
    calls += 4 * static_cast<int>(std::size(kCases));
    if (wrong > 0) {
      std::printf("%s: %d of the callers side by side found something else\n", isa.c_str(), wrong.load());
      return 1;
    }
    std::printf("%s: the same on 1 to 4 threads and for 4 callers at once\n", isa.c_str());
  }
  std::printf("%d runs of every op\n", calls);
  return 0;
}
