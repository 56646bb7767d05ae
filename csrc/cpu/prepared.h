// A codebook as the search wants it, made for one call or kept by `prepare`.
#pragma once

#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace vqk::cpu {

struct Prepared {
  Codes codes{};
  // what `codes` points to; the codebook itself stays with the caller where it needs no conversion
  std::vector<Tensor> parts;

  // from a codebook, or from the points of its dithered curve where dither has data; `like` is on its device
  Prepared(const NearestCodeKernels& body, const Tensor& like, const Rows& codebook, const Rows& dither);
  // from what another one kept; prepared anew where that was for another instruction set
  Prepared(const NearestCodeKernels& body, const Tensor& codebook, std::vector<Tensor> kept);

  // one for each group of a codebook, all made at a time
  static std::vector<Prepared> of_groups(const NearestCodeKernels& body, const Tensor& codebook,
                                         const MaybeTensor& dither, int64_t groups);

 private:
  Prepared() = default;
  void allocate(const NearestCodeKernels& body, const Tensor& like, const Rows& codebook, bool dithered);
  void make(const NearestCodeKernels& body, const Rows& codebook, const Rows& dither);
  void point();
  void find_centre();
  void drop_repeated(const int64_t* hashes);
  void set_apart(const double* norms);
};

}  // namespace vqk::cpu
