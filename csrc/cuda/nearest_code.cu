// The nearest code, exactly: prepare the codebook, search in half precision, certify and finish, look again
// for the candidates of the rows that stay open, and search in float64 what is left. Every launch has a fixed
// grid and the device alone knows how many rows are open, so that nothing waits for the host.
#include "brute.cuh"
#include "finish.cuh"
#include "launch.cuh"
#include "prepare.cuh"
#include "search.h"

namespace vqk::cuda {
namespace {

cudaError_t chip_of(Chip* chip) {
  thread_local int known = -1;
  thread_local Chip kept;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device != known) {
    const struct {
      int* to;
      cudaDeviceAttr what;
    } asked[] = {{&kept.major, cudaDevAttrComputeCapabilityMajor},
                 {&kept.minor, cudaDevAttrComputeCapabilityMinor},
                 {&kept.processors, cudaDevAttrMultiProcessorCount},
                 {&kept.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
    known = -1;
    for (const auto& each : asked)
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(each.to, each.what, device);
    if (error == cudaSuccess && kept.major == 9 && !sm90_ready()) kept.major = 8;
    if (error == cudaSuccess) known = device;
  }
  *chip = kept;
  return error;
}

Format format_for(const NearestCode& a) {
  return format_of(a.x.type, a.codebook.type, a.dither.data != nullptr);
}

struct Plans {
  Format format;
  Plan search, candidates;
  int processors;
  int64_t capacity;  // of open rows
};

cudaError_t plans_of(const NearestCode& a, Plans* plans) {
  Chip chip{};
  const cudaError_t error = chip_of(&chip);
  if (error != cudaSuccess) return error;
  const int64_t count = a.x.count();
  // rows are listed in 32 bits, codes in 31 with room for padding
  if (count > UINT32_MAX || a.codes > INT32_MAX - kTile) return cudaErrorInvalidValue;
  *plans = {};
  plans->format = format_for(a);
  plans->processors = chip.processors;
  if (plans->format == Format::wide) return cudaSuccess;
  plans->search = plan_of(count, a.codes, a.x.features, chip);
  Chip portable = chip;
  portable.major = 8;
  plans->candidates = plan_of(count, a.codes, a.x.features, portable);
  if (plans->candidates.rows) plans->capacity = open_capacity(count);
  return cudaSuccess;
}

// the scratch memory of a call, divided; with a null base, how much it is
struct Scratch {
  unsigned int* counters;  // open rows, left rows, then what brute_kernel counts
  Part* parts;
  uint4* results;
  Open open;
  Left left;
  int64_t bytes = 0;

  Scratch(const NearestCode& a, const Plans& plans) {
    const int64_t count = a.x.count(), splits = plans.search.splits;
    const bool searched = plans.search.rows != 0;
    char* const base = (char*)a.scratch;
    const auto take = [&](int64_t size) {
      char* const here = base + bytes;
      bytes += round_up(size, 256);
      return here;
    };
    counters = (unsigned int*)take(counter_bytes());
    parts = (Part*)take((int64_t)kBruteBlocks * kBruteRows * (int64_t)sizeof(Part));
    results = (uint4*)take(searched ? splits * count * (int64_t)sizeof(uint4) : 0);
    const int64_t capacity = plans.capacity;
    open.count = counters;
    open.capacity = (unsigned int)capacity;
    open.rows = (uint32_t*)take(capacity * 4);
    open.bars = (float*)take(capacity * 4);
    open.found = (unsigned int*)take(capacity * 4);
    open.codes = (uint32_t*)take(capacity * kCandidates * 4);
    left.count = counters + 1;
    left.rows = (uint32_t*)take(searched ? count * 4 : 0);
  }

  static constexpr int64_t counter_bytes() { return (2 + kBruteBlocks) * (int64_t)sizeof(unsigned int); }
  unsigned int* done() const { return counters + 2; }
};

cudaError_t prepare(const NearestCode& a, Format format, int processors, cudaStream_t stream) {
  const Preparation p{points_of(a), a.codes, a.codebook.features, a.prepared};
  cudaError_t error = cudaMemsetAsync(a.prepared.spread, 0, sizeof(Spread), stream);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (padded_codes(a.codes) + 7) / 8, most = (int64_t)processors * 8;
  const Launch how{dim3((unsigned int)(blocks < most ? blocks : most)), dim3(32, 8), 0, stream};
  const bool scaled = format == Format::scaled;
  if (scaled || format == Format::wide) {
    error = launch(how, survey_kernel, p);
    if (error != cudaSuccess || format == Format::wide) return error;
  }
  return format == Format::bf16 ? launch(how, pack_kernel<__nv_bfloat16>, p, scaled)
                                : launch(how, pack_kernel<__half>, p, scaled);
}

cudaError_t finish(const Finish& f, int processors, bool bf16, const Plan& plan, cudaStream_t stream) {
  const bool along = f.search.x.stride_feature == 1 && f.search.features >= 32;
  const bool whole = f.search.vector && f.search.points.vector && !f.search.points.dither.data;
  const Launch how{dim3(grid_of(f.search.count * (along ? 8 : 1), 256)), 256, 0, stream};
  cudaError_t error = !along  ? launch(how, finish_kernel<1, false>, f)
                      : whole ? launch(how, finish_kernel<8, true>, f)
                              : launch(how, finish_kernel<8, false>, f);
  // the fast search leaves no row to its candidates
  if (error != cudaSuccess || f.open.capacity == 0 || !f.exact) return error;
  error = candidates(f.search, f.open, plan, processors, bf16, stream);
  if (error != cudaSuccess) return error;
  return launch(Launch{dim3(processors * 2), 256, 0, stream}, settle_kernel, f);
}

}  // namespace

cudaError_t prepare_codes(const NearestCode& args, cudaStream_t stream) {
  Chip chip{};
  const cudaError_t error = chip_of(&chip);
  return error != cudaSuccess ? error : prepare(args, format_for(args), chip.processors, stream);
}

cudaError_t scratch_bytes(const NearestCode& args, int64_t* bytes) {
  Plans plans;
  const cudaError_t error = plans_of(args, &plans);
  if (error == cudaSuccess) {
    NearestCode nowhere = args;
    nowhere.scratch = nullptr;
    *bytes = Scratch(nowhere, plans).bytes;
  }
  return error;
}

cudaError_t nearest_code(const NearestCode& args, cudaStream_t stream) {
  const int64_t count = args.x.count();
  if (count == 0) return cudaSuccess;
  Plans plans;
  cudaError_t error = plans_of(args, &plans);
  if (error != cudaSuccess) return error;
  const Scratch scratch(args, plans);
  error = cudaMemsetAsync(scratch.counters, 0, Scratch::counter_bytes(), stream);
  if (error != cudaSuccess) return error;
  if (!args.ready) error = prepare(args, plans.format, plans.processors, stream);
  if (error != cudaSuccess) return error;
  const bool searched = plans.search.rows != 0;
  if (searched) {
    const bool bf16 = plans.format == Format::bf16;
    Search s{args.x,
             vectors(args.x),
             plans.format == Format::scaled,
             points_of(args),
             args.prepared,
             count,
             args.x.features,
             (int)(padded_codes(args.codes) / kTile),
             (int)(padded_features(args.x.features) / kStep),
             plans.search.splits,
             scratch.results};
    error = plans.search.hopper ? search_sm90(s, plans.search, bf16, stream)
                                : search_mma(s, plans.search, bf16, stream);
    if (error != cudaSuccess) return error;
    const Finish f{s, args.codes, args.exact, scratch.open, scratch.left, answers_of(args)};
    error = finish(f, plans.processors, bf16, plans.candidates, stream);
    if (error != cudaSuccess) return error;
  }
  const Brute b{args.x,
                points_of(args),
                args.codes,
                args.prepared.spread,
                searched ? scratch.left.rows : nullptr,
                searched ? scratch.left.count : nullptr,
                count,
                scratch.parts,
                scratch.done(),
                answers_of(args)};
  const int64_t most = (int64_t)plans.processors * 2;
  const Launch how{dim3((unsigned int)(most < kBruteBlocks ? most : kBruteBlocks)), kBruteThreads, 0, stream};
  return launch(how, brute_kernel, b);
}

}  // namespace vqk::cuda
