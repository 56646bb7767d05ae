#include "by_code.h"
#include "isa.h"
#include "ops.h"

namespace vqk::cpu {

std::tuple<Tensor, Tensor> code_sums(Tensor x, Tensor indices, int64_t num_codes) {
  const CodeSumsKernels& body = *kernels().code_sums;
  check_indices(indices);
  const Rows rows = rows_of(x), index = rows_of(indices, false);
  check_same_rows(rows, index, "indices");
  STD_TORCH_CHECK(
      rows.features > 0 && num_codes > 0,
      "native: x must have features, and num_codes must be at least 1; got neither or one of them. "
      "Pass x with one or more columns and num_codes of 1 or more.");
  const int64_t d = rows.features, count = rows.count();
  Tensor counts = torch::stable::new_empty(x, {num_codes}, ScalarType::Long);
  Tensor sums = torch::stable::new_empty(x, {num_codes, d},
                                         rows.type == Type::f64 ? ScalarType::Double : ScalarType::Float);

  const auto codes = memory<int64_t>(count);
  constexpr int64_t kRows = 1024;
  each_task((count + kRows - 1) / kRows, body.scratch(d), [&](int64_t task, void* scratch) {
    const int64_t begin = task * kRows, end = std::min(count, begin + kRows);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t code = reinterpret_cast<const int64_t*>(
          index.data)[n / index.inner * index.stride_batch + n % index.inner * index.stride_inner];
      codes[n] = code < num_codes ? std::max<int64_t>(code, -1) : -1;
    }
    body.drop_non_finite(rows, begin, end, scratch, codes.get());
  });
  int64_t* const out = counts.mutable_data_ptr<int64_t>();
  Sums args{};
  args.x = rows;
  args.codebook = no_rows();
  args.by_row = codes.get();
  args.entries = count;
  args.codes = num_codes;
  args.out = rows_of(sums);
  args.wide = rows.type == Type::f64;
  const Columns columns(body, args);
  if (columns.slab) {
    count_codes(codes.get(), count, num_codes, out);
    sum_columns(body, args, columns);
    return {counts, sums};
  }
  const ByCode by_code(codes.get(), count, num_codes);
  for (int64_t j = 0; j < num_codes; ++j) out[j] = by_code.starts[j + 1] - by_code.starts[j];
  sum_sorted(body, args, by_code);
  return {counts, sums};
}

}  // namespace vqk::cpu
