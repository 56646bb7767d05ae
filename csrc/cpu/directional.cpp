#include "by_code.h"
#include "isa.h"
#include "ops.h"

namespace vqk::cpu {
namespace {

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
  args.seed = seed_of(seed);
  args.direction = static_cast<int>(direction);
  args.noise_std = noise_std;
  args.row_offset = row_offset;
  args.wide = distance_type(args.x, args.codebook) == ScalarType::Double;
  return args;
}

}  // namespace

Tensor directional(Tensor x, Tensor codebook, Tensor indices, MaybeTensor position, Tensor seed,
                   int64_t direction, double noise_std, int64_t row_offset) {
  Directional args = arguments(x, codebook, indices, position, seed, direction, noise_std, row_offset);
  Tensor z = torch::stable::empty_like(x);
  if (x.numel() == 0) return z;
  args.z = rows_of(z);
  const DirectionalKernels& body = *kernels().directional;
  each_range(args.x, body.scratch(args.x.features),
             [&](int64_t begin, int64_t end, void* scratch) { body.forward(args, begin, end, scratch); });
  return z;
}

std::tuple<Tensor, Tensor> directional_backward(Tensor grad, Tensor x, Tensor codebook, Tensor indices,
                                                MaybeTensor position, Tensor seed, int64_t direction,
                                                double noise_std, int64_t row_offset) {
  Directional args = arguments(x, codebook, indices, position, seed, direction, noise_std, row_offset);
  args.grad = rows_of(grad);
  check_same_rows(args.x, args.grad, "grad");
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_codebook = torch::stable::new_empty(codebook, codebook.sizes());
  args.z = rows_of(grad_x);
  const Kernels& bodies = kernels();
  const int64_t count = args.x.count(), entries = count * (position ? 2 : 1);
  const auto codes = memory<int64_t>(entries);
  const auto pull = memory<double>(entries);
  args.codes = codes.get();
  args.pull = pull.get();
  each_range(args.x, bodies.directional->scratch(args.x.features),
             [&](int64_t begin, int64_t end, void* scratch) {
               bodies.directional->backward(args, begin, end, scratch);
             });
  Sums sums{};
  sums.x = args.x;
  sums.codebook = args.codebook;
  sums.pull = pull.get();
  sums.by_row = codes.get();
  sums.entries = entries;
  sums.codes = args.codebook.inner;
  sums.out = rows_of(grad_codebook);
  sums.wide = args.wide;
  const Columns columns(*bodies.code_sums, sums);
  if (columns.slab)
    sum_columns(*bodies.code_sums, sums, columns);
  else
    sum_sorted(*bodies.code_sums, sums, ByCode(codes.get(), entries, sums.codes));
  return {grad_x, grad_codebook};
}

}  // namespace vqk::cpu
