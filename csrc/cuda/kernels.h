// Launchers of the CUDA bodies: plain pointers, sizes and strides in, a cudaError_t out; no torch header.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "../cpu/rows.h"

namespace vqk::cuda {

// what the search keeps of a codebook; the bits of doubles that are not negative order as integers, and all
// begin at 0
struct Spread {
  unsigned long long largest;     // |element| of a finite point, unscaled
  unsigned long long norm, lost;  // C, R of certificate.h
  unsigned long long finite;      // complement of the lowest index of a finite point; 0: there is none
};

struct Prepared {
  void* half;      // (padded codes, padded features): minus the half copies, tiles in the order of place_of
  float* bias;     // (padded codes): half norms, inf where a code cannot win
  Spread* spread;  // (1)
};

struct NearestCode {
  Rows x, codebook, dither;  // dither.data null: the codes themselves
  int64_t codes;             // K, or K - 1 points of the dithered curve
  bool exact, wide;          // wide: sq_dist is float64
  bool ready;                // prepared was filled by an earlier call
  int64_t* indices;          // (N)
  void* sq_dist;             // (N)
  Prepared prepared;
  void* scratch;  // scratch_bytes(args) bytes, aligned to 256
};

// only x.type, codebook, dither, codes and prepared are read
cudaError_t prepare_codes(const NearestCode& args, cudaStream_t stream);
// prepared and the pointers of results are not read
cudaError_t scratch_bytes(const NearestCode& args, int64_t* bytes);
cudaError_t nearest_code(const NearestCode& args, cudaStream_t stream);

struct Directional {
  Rows x, z, grad;                   // z is grad_x in the backward pass
  Rows codebook, indices, position;  // position.data null: one point per row
  const int64_t* seed;
  int direction;  // 0 noisy, 1 detach, 2 random
  double noise_std;
  int64_t row_offset;
  bool wide;       // arithmetic in float64, else float32
  int64_t* codes;  // backward: (points, N) code of each point, -1 where it has no gradient
  double* pull;    // backward: (points, N) w (g . u) / r
};
cudaError_t directional(const Directional& args, bool backward, cudaStream_t stream);

// codes[n] = -1 where a row is not finite or its index is out of range
cudaError_t usable_codes(const Rows& x, const Rows& indices, int64_t num_codes, int64_t* codes,
                         cudaStream_t stream);

// sums of rows per code over entries sorted by code, in order
struct Sums {
  Rows x;
  Rows codebook;           // data null: add x itself, else pull * (c - x)
  const double* pull;      // by entry
  const int64_t* sorted;   // (entries) codes in ascending order, -1 first
  const int64_t* entries;  // (entries) where each came from; row = entry % N
  int64_t count, codes;    // entries, K
  Rows out;                // (1, K, D)
  int64_t* counts;         // (K) or null
  bool wide;
};
cudaError_t sums(const Sums& args, cudaStream_t stream);

cudaError_t philox(const int64_t* seed, int64_t rows, int64_t blocks, uint32_t stream_number,
                   int64_t row_offset, int64_t* words, float* normals, cudaStream_t stream);

}  // namespace vqk::cuda
