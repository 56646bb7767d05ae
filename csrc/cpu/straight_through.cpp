#include "by_code.h"
#include "isa.h"
#include "ops.h"

namespace vqk::cpu {
namespace {

StraightThrough arguments(const Tensor& x, const Tensor& codebook, const Tensor& indices) {
  StraightThrough args{};
  args.x = rows_of(x);
  args.codebook = rows_of(codebook);
  check_indices(indices);
  args.indices = rows_of(indices, false);
  check_pair(args.x, args.codebook, 1);
  check_same_rows(args.x, args.indices, "indices");
  args.wide = distance_type(args.x, args.codebook) == ScalarType::Double;
  return args;
}

double number_of(const Tensor& t) {
  STD_TORCH_CHECK(
      t.numel() == 1 && (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double),
      "native: pull must be one number, float32 or float64; got another. Call .float().");
  return t.scalar_type() == ScalarType::Double ? *t.const_data_ptr<double>() : *t.const_data_ptr<float>();
}

// sums of what `sums` describes, from the rows of each code
void sum_by(const CodeSumsKernels& body, Sums sums, const Rows& out, std::optional<ByCode>& by_code) {
  sums.out = out;
  const Columns columns(body, sums);
  if (columns.slab) return sum_columns(body, sums, columns);
  if (!by_code) by_code.emplace(sums.by_row, sums.entries, sums.codes);
  sum_sorted(body, sums, *by_code);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> straight_through(Tensor x, Tensor codebook, Tensor indices) {
  StraightThrough args = arguments(x, codebook, indices);
  Tensor z = torch::stable::empty_like(x);
  Tensor sq_dist = torch::stable::new_empty(x, {args.x.batch, args.x.inner},
                                            args.wide ? ScalarType::Double : ScalarType::Float);
  Tensor totals = torch::stable::new_empty(x, {2}, ScalarType::Double);
  args.z = rows_of(z);
  args.sq_dist = sq_dist.mutable_data_ptr();
  const int64_t parts = 2 * ((args.x.count() + kTotals - 1) / kTotals);
  const auto each = memory<double>(parts);
  std::fill_n(each.get(), parts, 0.0);
  args.totals = each.get();
  const StraightThroughKernels& body = *kernels().straight_through;
  each_range(args.x, body.scratch(args.x.features),
             [&](int64_t begin, int64_t end, void* scratch) { body.forward(args, begin, end, scratch); });
  double sum = 0, rows = 0;
  for (int64_t part = 0; part < parts; part += 2) sum += each[part], rows += each[part + 1];
  double* const out = totals.mutable_data_ptr<double>();
  out[0] = sum, out[1] = rows;
  return {z, sq_dist, totals};
}

std::tuple<Tensor, Tensor> straight_through_backward(Tensor grad, Tensor pull, Tensor x, Tensor codebook,
                                                     Tensor indices, bool rotation, double commitment,
                                                     double codebook_weight, double sync, bool need_x,
                                                     bool need_codebook) {
  StraightThrough args = arguments(x, codebook, indices);
  args.grad = rows_of(grad);
  check_same_rows(args.x, args.grad, "grad");
  const int64_t count = args.x.count(), num_codes = args.codebook.inner, d = args.x.features;
  const double strength = number_of(pull);
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_codebook = need_codebook ? torch::stable::new_empty(codebook, codebook.sizes())
                                       : torch::stable::new_empty(codebook, {0});
  const Kernels& bodies = kernels();
  const auto codes = memory<int64_t>(need_codebook ? count : 0);
  args.rotation = rotation;
  args.by = commitment * strength;
  args.codes = need_codebook ? codes.get() : nullptr;
  if (need_x) {
    args.z = rows_of(grad_x);
    const StraightThroughKernels& body = *bodies.straight_through;
    each_range(args.x, body.scratch(d),
               [&](int64_t begin, int64_t end, void* scratch) { body.backward(args, begin, end, scratch); });
  } else if (need_codebook) {
    each_range(args.x, bodies.code_sums->scratch(d), [&](int64_t begin, int64_t end, void* scratch) {
      for (int64_t n = begin; n < end; ++n) {
        const Rows& index = args.indices;
        const int64_t code = reinterpret_cast<const int64_t*>(
            index.data)[n / index.inner * index.stride_batch + n % index.inner * index.stride_inner];
        codes[n] = code < num_codes ? std::max<int64_t>(code, -1) : -1;
      }
      bodies.code_sums->drop_non_finite(args.x, begin, end, scratch, codes.get());
    });
  }
  if (!need_codebook) return {grad_x, grad_codebook};

  Sums sums{};
  sums.by_row = codes.get();
  sums.entries = count;
  sums.codes = num_codes;
  sums.wide = args.wide;
  std::optional<ByCode> by_code;
  const Rows out = rows_of(grad_codebook);
  // without sync the sums of differences are the gradient, else a part of it that waits for the other
  const bool both = sync != 0, pulled = codebook_weight != 0 || !both;
  const int64_t room = num_codes * d;
  const auto differences = memory<double>(both ? room : 0), upstream = memory<double>(both ? room : 0);
  const auto wide = [&](const Memory<double>& table) {
    return Rows{reinterpret_cast<char*>(table.get()), Type::f64, 1, num_codes, d, 0, d, 1};
  };
  if (pulled) {
    const auto pulls = memory<double>(count);
    std::fill_n(pulls.get(), count, codebook_weight * strength);
    sums.x = args.x;
    sums.codebook = args.codebook;
    sums.pull = pulls.get();
    sum_by(*bodies.code_sums, sums, both ? wide(differences) : out, by_code);
  }
  if (both) {
    sums.x = args.grad;
    sums.codebook = no_rows();
    sum_by(*bodies.code_sums, sums, wide(upstream), by_code);
    const double* const first = pulled ? differences.get() : nullptr;
    each_range(out, sizeof(double) * d, [&](int64_t begin, int64_t end, void* scratch) {
      bodies.straight_through->add(first, sync, upstream.get(), out, begin, end, scratch);
    });
  }
  return {grad_x, grad_codebook};
}

}  // namespace vqk::cpu
