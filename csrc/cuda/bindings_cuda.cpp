// The CUDA bodies for torch's dispatcher; compiled only against a torch that has CUDA.
#define USE_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "kernels.h"
#include "plan.h"

namespace vqk::cuda {
namespace {

// the device of a tensor, current while this lives, and torch's stream on it
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Place(const Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "native: a CUDA launch must succeed; got ", cudaGetErrorString(error),
                  ". Set CUDA_LAUNCH_BLOCKING=1 to find it.");
}

Tensor bytes_like(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// codes in ascending order, stable, and where each came from
std::tuple<Tensor, Tensor> sorted(const Tensor& codes) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(codes), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// what of a search does not depend on its outputs; of groups, that of the first
NearestCode request(const Rows& x, const Tensor& codebook, const MaybeTensor& dither) {
  NearestCode args{};
  const bool grouped = codebook.dim() == 3;
  args.x = x;
  args.codebook = rows_of(codebook, true, grouped);
  args.dither = dither ? rows_of(*dither, false, grouped) : no_rows();
  check_pair(args.x, args.codebook, dither ? 2 : 1);
  STD_TORCH_CHECK(!dither || args.dither.inner == args.codebook.inner - 1,
                  "native: dither must be (K - 1,); got another shape. Pass one weight per segment.");
  args.codes = args.codebook.inner - (dither ? 1 : 0);
  return args;
}

// half copies, half norms, spread
std::vector<Tensor> buffers(const Tensor& codebook, Format format, int64_t codes, int64_t features) {
  // float64 is searched as it is, and asks for the spread alone
  const int64_t rows = format == Format::wide ? 0 : padded_codes(codes);
  const ScalarType half = format == Format::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
  return {torch::stable::new_empty(codebook, {rows, padded_features(features)}, half),
          torch::stable::new_empty(codebook, {rows}, ScalarType::Float),
          bytes_like(codebook, sizeof(Spread))};
}

Prepared prepared_in(const std::vector<Tensor>& parts) {
  return {parts[0].mutable_data_ptr(), static_cast<float*>(parts[1].mutable_data_ptr()),
          static_cast<Spread*>(parts[2].mutable_data_ptr())};
}

void check_parts(const std::vector<Tensor>& parts, const Tensor& codebook, Format format, int64_t codes,
                 int64_t features) {
  const ScalarType half = format == Format::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
  const int64_t rows = format == Format::wide ? 0 : padded_codes(codes);
  STD_TORCH_CHECK(parts.size() == 3 && parts[0].dim() == 2 && parts[0].size(0) == rows &&
                      parts[0].size(1) == padded_features(features) && parts[0].scalar_type() == half &&
                      parts[1].numel() == rows && parts[2].numel() == sizeof(Spread) &&
                      parts[0].get_device_index() == codebook.get_device_index(),
                  "native: parts must be of this codebook, for this dtype of x, on this device; got others. "
                  "Prepare them again.");
}

std::tuple<Tensor, Tensor> nearest_code_op(Tensor x, Tensor codebook, MaybeTensor dither, bool exact,
                                           std::vector<Tensor> parts) {
  const Place place(x);
  const bool grouped = codebook.dim() == 3;
  const int64_t groups = groups_of(x, codebook, dither);
  NearestCode args = request(rows_of(x, true, grouped), codebook, dither);
  const ScalarType type = distance_type(args.x, args.codebook);
  const Format format = format_of(args.x.type, args.codebook.type, dither.has_value());
  const int64_t d = args.x.features;
  args.exact = exact;
  args.wide = type == ScalarType::Double;
  const auto leading = x.sizes().slice(0, static_cast<size_t>(x.dim() - 1));
  Tensor indices = torch::stable::new_empty(x, leading, ScalarType::Long);
  Tensor sq_dist = torch::stable::new_empty(x, leading, type);
  if (args.x.count() == 0) return {indices, sq_dist};
  args.ready = !parts.empty();
  if (args.ready) {
    STD_TORCH_CHECK(!dither && !grouped,
                    "native: parts must be empty where there is dither, or are groups; got some. Pass none.");
    check_parts(parts, codebook, format, args.codes, d);
  } else {
    parts = buffers(codebook, format, args.codes, d);
  }
  args.prepared = prepared_in(parts);
  int64_t bytes = 0;
  check(scratch_bytes(args, &bytes));
  Tensor scratch = bytes_like(x, bytes);
  args.scratch = scratch.mutable_data_ptr();
  const int64_t count = args.x.count();
  // one after the other on the stream, in the same memory
  for (int64_t g = 0; g < groups; ++g) {
    NearestCode one = args;
    one.x = group_of(args.x, x, g);
    one.codebook = group_of(args.codebook, codebook, g);
    if (dither) one.dither = group_of(args.dither, *dither, g);
    one.indices = indices.mutable_data_ptr<int64_t>() + g * count;
    one.sq_dist = static_cast<char*>(sq_dist.mutable_data_ptr()) + g * count * (args.wide ? 8 : 4);
    check(nearest_code(one, place.stream));
  }
  return {indices, sq_dist};
}

std::vector<Tensor> prepare_codes_op(Tensor codebook, ScalarType x_dtype) {
  const Place place(codebook);
  Rows x = rows_of(codebook);
  x.type = x_dtype == ScalarType::Half       ? Type::f16
           : x_dtype == ScalarType::BFloat16 ? Type::bf16
           : x_dtype == ScalarType::Float    ? Type::f32
                                             : Type::f64;
  NearestCode args = request(x, codebook, MaybeTensor());
  std::vector<Tensor> parts =
      buffers(codebook, format_of(x.type, args.codebook.type, false), args.codes, x.features);
  args.prepared = prepared_in(parts);
  check(prepare_codes(args, place.stream));
  return parts;
}

Directional arguments(const Tensor& x, const Tensor& codebook, const Tensor& indices,
                      const MaybeTensor& position, const Tensor& seed, int64_t direction, double noise_std,
                      int64_t row_offset) {
  Directional args{};
  args.x = rows_of(x);
  args.codebook = rows_of(codebook);
  check_indices(indices);
  args.indices = rows_of(indices, false);
  args.position = position ? rows_of(*position, false) : no_rows();
  check_pair(args.x, args.codebook, 1);
  check_same_rows(args.x, args.indices, "indices");
  if (position) check_same_rows(args.x, args.position, "position");
  args.seed = seed.const_data_ptr<int64_t>();
  args.direction = static_cast<int>(direction);
  args.noise_std = noise_std;
  args.row_offset = row_offset;
  args.wide = distance_type(args.x, args.codebook) == ScalarType::Double;
  return args;
}

Tensor directional_op(Tensor x, Tensor codebook, Tensor indices, MaybeTensor position, Tensor seed,
                      int64_t direction, double noise_std, int64_t row_offset) {
  const Place place(x);
  Directional args = arguments(x, codebook, indices, position, seed, direction, noise_std, row_offset);
  Tensor z = torch::stable::empty_like(x);
  args.z = rows_of(z);
  check(directional(args, false, place.stream));
  return z;
}

std::tuple<Tensor, Tensor> directional_backward_op(Tensor grad, Tensor x, Tensor codebook, Tensor indices,
                                                   MaybeTensor position, Tensor seed, int64_t direction,
                                                   double noise_std, int64_t row_offset) {
  const Place place(x);
  Directional args = arguments(x, codebook, indices, position, seed, direction, noise_std, row_offset);
  args.grad = rows_of(grad);
  check_same_rows(args.x, args.grad, "grad");
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_codebook = torch::stable::new_empty(codebook, codebook.sizes());
  args.z = rows_of(grad_x);
  const int64_t entries = args.x.count() * (position ? 2 : 1);
  Tensor codes = torch::stable::new_empty(x, {entries}, ScalarType::Long);
  Tensor pull = torch::stable::new_empty(x, {entries}, ScalarType::Double);
  args.codes = codes.mutable_data_ptr<int64_t>();
  args.pull = pull.mutable_data_ptr<double>();
  check(directional(args, true, place.stream));
  const auto [order, from] = sorted(codes);
  Sums request{};
  request.x = args.x;
  request.codebook = args.codebook;
  request.pull = args.pull;
  request.sorted = order.const_data_ptr<int64_t>();
  request.entries = from.const_data_ptr<int64_t>();
  request.count = entries;
  request.codes = args.codebook.inner;
  request.out = rows_of(grad_codebook);
  request.wide = args.wide;
  check(sums(request, place.stream));
  return {grad_x, grad_codebook};
}

std::tuple<Tensor, Tensor> code_sums_op(Tensor x, Tensor indices, int64_t num_codes) {
  const Place place(x);
  check_indices(indices);
  const Rows rows = rows_of(x), index = rows_of(indices, false);
  check_same_rows(rows, index, "indices");
  Tensor counts = torch::stable::new_empty(x, {num_codes}, ScalarType::Long);
  Tensor totals = torch::stable::new_empty(x, {num_codes, rows.features},
                                           rows.type == Type::f64 ? ScalarType::Double : ScalarType::Float);
  Tensor codes = torch::stable::new_empty(x, {rows.count()}, ScalarType::Long);
  check(usable_codes(rows, index, num_codes, codes.mutable_data_ptr<int64_t>(), place.stream));
  const auto [order, from] = sorted(codes);
  Sums request{};
  request.x = rows;
  request.codebook = no_rows();
  request.sorted = order.const_data_ptr<int64_t>();
  request.entries = from.const_data_ptr<int64_t>();
  request.count = rows.count();
  request.codes = num_codes;
  request.out = rows_of(totals);
  request.counts = counts.mutable_data_ptr<int64_t>();
  request.wide = rows.type == Type::f64;
  check(sums(request, place.stream));
  return {counts, totals};
}

std::tuple<Tensor, Tensor> philox_op(Tensor seed, int64_t rows, int64_t blocks, int64_t stream,
                                     int64_t row_offset) {
  const Place place(seed);
  Tensor words = torch::stable::new_empty(seed, {rows, blocks, 4}, ScalarType::Long);
  Tensor normals = torch::stable::new_empty(seed, {rows, blocks, 4}, ScalarType::Float);
  check(philox(seed.const_data_ptr<int64_t>(), rows, blocks, static_cast<uint32_t>(stream), row_offset,
               words.mutable_data_ptr<int64_t>(), normals.mutable_data_ptr<float>(), place.stream));
  return {words, normals};
}

}  // namespace
}  // namespace vqk::cuda

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CUDA, m) {
  m.impl("nearest_code", TORCH_BOX(&vqk::cuda::nearest_code_op));
  m.impl("prepare_codes", TORCH_BOX(&vqk::cuda::prepare_codes_op));
  m.impl("directional", TORCH_BOX(&vqk::cuda::directional_op));
  m.impl("directional_backward", TORCH_BOX(&vqk::cuda::directional_backward_op));
  m.impl("code_sums", TORCH_BOX(&vqk::cuda::code_sums_op));
  m.impl("philox", TORCH_BOX(&vqk::cuda::philox_op));
}
