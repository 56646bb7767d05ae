// A codebook as the search wants it, made for one call or kept by `prepare`.
#pragma once

#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace vqk::cpu {

struct Prepared {
  static constexpr int kParts = 8;

  Codes codes{};
  // memory that `codes` points to, that of all groups with the first of them; the codebook itself stays with
  // the caller where it needs no conversion
  std::vector<Tensor> parts;

  // none yet
  Prepared() = default;
  Prepared(const NearestCodeKernels& body, const Tensor& codebook);
  // from what another one kept; prepared anew where that was for another instruction set
  Prepared(const NearestCodeKernels& body, const Tensor& codebook, std::vector<Tensor> kept);
  // one for each group of a codebook (G, K, D), or one alone; of the points of dithered curves where there is
  // dither
  static std::vector<Prepared> of_groups(const NearestCodeKernels& body, const Tensor& codebook,
                                         const MaybeTensor& dither, int64_t groups);

 private:
  void* base[kParts] = {};

  template <class T>
  T* memory_of(int part) const {
    return static_cast<T*>(base[part]);
  }
  void make(const NearestCodeKernels& body, const Rows& codebook, const Rows& dither);
  void point();
  void find_centre();
  void drop_repeated(const int64_t* hashes);
  void set_apart(const double* norms);
};

}  // namespace vqk::cpu
