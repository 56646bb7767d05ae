// Runs the CUDA search on the CPU and compares it with the contract, for cases given as words:
//   hopper|portable N K D x-type codebook-type flavour layout exact|fast seed
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "cuda/certificate.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

using namespace vqk;
using namespace vqk::cuda;

// what the host side asks of the runtime
extern "C" {
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) {
  memset(p, v, n);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrComputeCapabilityMajor   ? emulated::compute_major
           : what == cudaDevAttrComputeCapabilityMinor ? emulated::compute_minor
           : what == cudaDevAttrMultiProcessorCount    ? emulated::processors
                                                       : emulated::block_shared;
  return cudaSuccess;
}
}

namespace vqk::cuda::sm90 {
struct Map {
  const char* data;
  uint64_t sizes[2], pitch;
  uint32_t box[2];
};
}  // namespace vqk::cuda::sm90

static CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                       const cuuint64_t* sizes, const cuuint64_t* pitch, const cuuint32_t* box,
                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  // the limits that the driver checks
  if (rank != 2 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 > 128 || box[1] > 256 ||
      pitch[0] % 16 || (size_t)data % 16 || sizes[0] == 0)
    return CUDA_ERROR_INVALID_VALUE;
  const sm90::Map kept{(const char*)data, {sizes[0], sizes[1]}, pitch[0], {box[0], box[1]}};
  memset(map, 0, sizeof *map);
  memcpy(map, &kept, sizeof kept);
  return CUDA_SUCCESS;
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned int,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult* result) {
  *found = (void*)encode;
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

static std::mt19937_64 draw;
static double normal() { return std::normal_distribution<double>()(draw); }

static Type type_named(const std::string& name) {
  return name == "f16" ? Type::f16 : name == "bf16" ? Type::bf16 : name == "f32" ? Type::f32 : Type::f64;
}

static void store(char* data, Type type, int64_t at, double v) {
  const float f = (float)v;
  if (type == Type::f64) ((double*)data)[at] = v;
  if (type == Type::f32) ((float*)data)[at] = f;
  if (type == Type::f16) ((__half*)data)[at] = __float2half_rn(f);
  if (type == Type::bf16) ((__nv_bfloat16*)data)[at] = __float2bfloat16_rn(f);
}

static double fetch(const char* data, Type type, int64_t at) {
  if (type == Type::f64) return ((const double*)data)[at];
  if (type == Type::f32) return ((const float*)data)[at];
  if (type == Type::f16) return __half2float(((const __half*)data)[at]);
  return __bfloat162float(((const __nv_bfloat16*)data)[at]);
}

// (N, D) behind the strides of a layout
struct Matrix {
  std::vector<char> memory;
  Rows rows;

  Matrix(int64_t n, int64_t d, Type type, const std::string& layout) {
    memory.assign((size_t)((n + 8) * (d + 8) * 8 + 64), (char)0xff);
    char* const data = (char*)(((size_t)memory.data() + 15) / 16 * 16);
    rows = Rows{data, type, 1, n, d, 0, d, 1};
    if (layout == "sliced") rows.stride_inner = d + 3, rows.data += size_of(type);
    if (layout == "transposed") rows.stride_inner = 1, rows.stride_feature = n;
    if (layout == "channels" && n % 2 == 0) rows = Rows{data, type, 2, n / 2, d, n / 2 * d, 1, n / 2};
  }
  int64_t at(int64_t n, int64_t k) const {
    return n / rows.inner * rows.stride_batch + n % rows.inner * rows.stride_inner + k * rows.stride_feature;
  }
  double get(int64_t n, int64_t k) const { return fetch(rows.data, rows.type, at(n, k)); }
  void set(int64_t n, int64_t k, double v) { store(rows.data, rows.type, at(n, k), v); }
};

static int run_case(char** words) {
  const bool hopper = std::string(words[0]) == "hopper";
  const int64_t n = atol(words[1]), k = atol(words[2]), d = atol(words[3]);
  const Type x_type = type_named(words[4]), c_type = type_named(words[5]);
  const std::string flavour = words[6], layout = words[7];
  const bool exact = std::string(words[8]) == "exact", dithered = flavour == "dither";
  draw.seed((unsigned)atol(words[9]));
  emulated::dice.seed((unsigned)atol(words[9]));
  emulated::compute_major = hopper ? 9 : 8;
  emulated::compute_minor = 0;
  emulated::block_shared = hopper ? 232448 : flavour == "small" ? 101376 : 166912;
  const int64_t points = dithered ? k - 1 : k;
  Matrix x(n, d, x_type, layout), c(k, d, c_type, layout == "transposed" ? "sliced" : "contiguous"),
      w(k, 1, Type::f64, "contiguous");
  const double scale = flavour == "tiny"   ? 1e-20
                       : flavour == "huge" ? 3e4
                                           : 1,
               offset = flavour == "offset" ? 1000 : 0;
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t f = 0; f < d; ++f) c.set(j, f, offset + scale * normal());
    // duplicates: ties everywhere
    if (flavour == "ties" && j > 0 && j % 3)
      for (int64_t f = 0; f < d; ++f) c.set(j, f, c.get(j / 2, f));
    w.set(j, 0, std::uniform_real_distribution<double>()(draw));
  }
  if (flavour == "bad")
    for (int64_t j = 0; j < k; j += 3) c.set(j, j % d, j % 2 ? NAN : INFINITY);
  if (flavour == "none")
    for (int64_t j = 0; j < k; ++j) c.set(j, j % d, NAN);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = (int64_t)(draw() % (uint64_t)k);
    const double size = flavour == "mixed" ? std::pow(10.0, (double)(i % 9) - 4) : 1;
    for (int64_t f = 0; f < d; ++f) {
      const double near = flavour == "bad" || flavour == "none" ? normal() : c.get(j, f);
      x.set(i, f, size * (near + 0.3 * scale * normal()));
    }
    if (flavour == "ties" && i % 5 == 0)
      for (int64_t f = 0; f < d; ++f) x.set(i, f, c.get(j, f));
    if (flavour == "zero" && i % 2)
      for (int64_t f = 0; f < d; ++f) x.set(i, f, 0);
  }
  if (flavour == "bad" || flavour == "mixed")
    for (int64_t i = 0; i < n; i += 7) x.set(i, i % d, i % 2 ? NAN : -INFINITY);

  NearestCode args{};
  args.x = x.rows;
  args.codebook = c.rows;
  args.codebook.stride_batch = 0;
  args.dither = dithered ? Rows{w.rows.data, Type::f64, 1, points, 1, 0, 1, 1}
                         : Rows{nullptr, Type::f32, 1, 0, 1, 0, 0, 1};
  args.codes = points;
  args.exact = exact;
  args.wide = x_type == Type::f64 || c_type == Type::f64;
  std::vector<int64_t> indices((size_t)n, -7);
  std::vector<double> sq_dist((size_t)n, -7);
  args.indices = indices.data();
  args.sq_dist = sq_dist.data();
  std::vector<char> half((size_t)(padded_codes(points) * padded_features(d) * 2 + 256), (char)0xff);
  std::vector<float> bias((size_t)padded_codes(points) + 64, NAN);
  Spread spread;
  args.prepared = {(void*)(((size_t)half.data() + 127) / 128 * 128),
                   (float*)(((size_t)bias.data() + 127) / 128 * 128), &spread};
  int64_t bytes = 0;
  if (scratch_bytes(args, &bytes) != cudaSuccess) return 1;
  std::vector<char> scratch((size_t)bytes + 256, (char)0xff);
  args.scratch = (void*)(((size_t)scratch.data() + 255) / 256 * 256);
  const cudaError_t error = nearest_code(args, nullptr);
  if (error != cudaSuccess) {
    printf("error %d\n", (int)error);
    return 1;
  }
  const unsigned open = ((unsigned*)args.scratch)[0], left = ((unsigned*)args.scratch)[1];
  int wrong = 0;
  const Reach reach{bits_as<double>(spread.norm), bits_as<double>(spread.lost), 0};
  for (int64_t i = 0; i < n; ++i) {
    bool finite = true;
    double square = 0;
    for (int64_t f = 0; f < d; ++f) finite &= std::isfinite(x.get(i, f)), square += x.get(i, f) * x.get(i, f);
    double least = INFINITY, mine = NAN;
    int64_t best = -1;
    for (int64_t j = 0; j < points; ++j) {
      double total = 0;
      bool good = true;
      for (int64_t f = 0; f < d; ++f) {
        double p = c.get(j, f);
        if (dithered) p = (1 - w.get(j, 0)) * p + w.get(j, 0) * c.get(j + 1, f);
        good &= std::isfinite(p);
        const double t = x.get(i, f) - p;
        total += t * t;
      }
      if (j == indices[(size_t)i]) mine = total;
      if (good && (best < 0 || total < least)) least = total, best = j;
    }
    if (!finite || best < 0) best = 0, least = NAN;
    const double said = args.wide ? sq_dist[(size_t)i] : (double)((float*)sq_dist.data())[i];
    const double tolerance = args.wide ? 1e-12 * least : 1.3e-7 * least + 1e-45;
    bool good = std::isnan(least) ? best == indices[(size_t)i] && std::isnan(said)
                : exact           ? best == indices[(size_t)i] && !(std::fabs(said - least) > tolerance)
                                  : !(std::fabs(said - mine) > 1.3e-7 * mine + 1e-45);
    if (!exact && !std::isnan(least) && good) {
      // the regret of the fast search; inputs multiplied themselves, so units are their own
      const Bound b = bound_of(std::sqrt(square), 0, 1, d, reach);
      if (x_type == c_type && x_type != Type::f32 && !dithered)
        good = mine - least <= 4 * (b.error - 1) + 1e-3 * (square + 1);
      if (x_type == Type::f32) good = mine - least <= 0.05 * (square + 1);
    }
    if (!good && ++wrong < 4)
      printf("row %ld: index %ld at %g (it is at %g), wanted %ld at %g\n", (long)i, (long)indices[(size_t)i],
             said, mine, (long)best, least);
  }
  printf("%s %s %s %s %s %s %s %s %s: wrong %d open %u left %u\n", words[0], words[1], words[2], words[3],
         words[4], words[5], flavour.c_str(), layout.c_str(), words[8], wrong, open, left);
  return wrong != 0;
}

int main(int count, char** words) {
  int failed = 0;
  for (int at = 1; at + 10 <= count; at += 10) {
    failed += run_case(words + at);
    fflush(stdout);
  }
  return failed != 0;
}
