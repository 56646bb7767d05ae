// Codes as integers, a tile of kCodes at a time, two features to a lane.
#pragma once

#include "bounds.h"

namespace vqk {
namespace {

void points(const Rows& codebook, const Rows& dither, int64_t begin, int64_t end, bool wide, void* out) {
  const int64_t d = codebook.features;
  if (!dither.data) {
    if (wide)
      load(codebook, begin, end - begin, (double*)out + begin * d, d);
    else
      load(codebook, begin, end - begin, (float*)out + begin * d, d);
    return;
  }
  for (int64_t s = begin; s < end; ++s) {
    double* const p = (double*)out + s * d;
    double weight;
    load(dither, s, 1, &weight, 1);
    load(codebook, s, 1, p, d);
    for (int64_t k0 = 0; k0 < d; k0 += 64) {
      double next[64];
      Rows part = codebook;
      part.data += k0 * part.stride_feature * size_of(part.type);
      part.features = smaller(64, d - k0);
      load(part, s + 1, 1, next, 64);
      for (int64_t k = 0; k < part.features; ++k) p[k0 + k] = (1 - weight) * p[k0 + k] + weight * next[k];
    }
  }
}

// zeros past the end
template <class C>
VQK_INLINE d8 upto8(const C* c, int64_t left) {
  if (left >= 8) return load8(c);
  d8 v = {};
  for (int64_t q = 0; q < left; ++q) v[q] = (double)c[q];
  return v;
}

typedef uint64_t u8 __attribute__((vector_size(64), may_alias));
constexpr uint64_t kHash = 0x27bb2ee687b0b0fd;

template <class C>
void survey_rows(const Codes& codes, int64_t begin, int64_t end, int64_t* hashes, double* norms,
                 Spread* spread) {
  const int64_t d = codes.features;
  double largest = 0;
  for (int64_t j = begin; j < end; ++j) {
    const C* const c = (const C*)codes.rows + j * d;
    codes.kinds[j] = finite(c, d) ? kUsual : kNever;
    if (codes.kinds[j] == kNever) continue;
    d8 squares = {}, high = {};
    u8 hash = {};
    for (int64_t k = 0; k < d; k += 8) {
      d8 v = upto8(c + k, d - k);
      // 0 added makes one of 0 and -0
      const u8 bits = (u8)(v + 0.0);
      u8 word = (bits ^ bits >> 32) * kHash;
      word ^= word >> 29;
      hash = hash * 5 + word;
      v -= load8(codes.centre + k);
      squares += v * v;
      v = v < 0 ? -v : v;
      high = v > high ? v : high;
    }
    uint64_t mixed = 0;
    for (int q = 0; q < 8; ++q) {
      mixed = (mixed ^ hash[q]) * kHash;
      mixed ^= mixed >> 29;
    }
    hashes[j] = (int64_t)(mixed >> 1);
    const double square = sum(squares);
    double most = 0;
    for (int q = 0; q < 8; ++q) most = high[q] > most ? high[q] : most;
    largest = most > largest ? most : largest;
    if (square < 0x1p1000 && square > 0x1p-900) {
      norms[j] = __builtin_sqrt(square) * kSlack;
      continue;
    }
    // where squares overflow or vanish, of features scaled by a power of two
    const double unit = most > 1 ? 0x1p-600 : 0x1p600;
    double scaled = 0;
    for (int64_t k = 0; k < d; ++k) {
      const double v = ((double)c[k] - codes.centre[k]) * unit;
      scaled += v * v;
    }
    norms[j] = __builtin_sqrt(scaled) / unit * kSlack;
  }
  spread->largest = largest;
}

void survey(const Codes& codes, int64_t begin, int64_t end, int64_t* hashes, double* norms, Spread* spread) {
  return codes.wide ? survey_rows<double>(codes, begin, end, hashes, norms, spread)
                    : survey_rows<float>(codes, begin, end, hashes, norms, spread);
}

// v rounded to an integer, ties to even, for |v| < 2^51
constexpr double kRound = 0x1.8p52;

template <class C>
void pack_codes(const Codes& codes, int64_t tile_begin, int64_t tile_end, Spread* spread) {
  const int64_t d = codes.features, pairs = (d + 1) / 2;
  double longest = 0, worst = 0;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    int32_t* const out = codes.packed + tile * pairs * kCodes;
    codes.absent[tile] = 0;
    for (int lane = 0; lane < kCodes; ++lane) {
      const int64_t j = tile * kCodes + lane;
      if (j >= codes.count || codes.kinds[j] != kUsual) {
        for (int64_t k = 0; k < pairs; ++k) out[k * kCodes + lane] = 0;
        codes.half_norms[tile * kCodes + lane] = 0;
        codes.absent[tile] = (uint16_t)(codes.absent[tile] | 1 << lane);
        continue;
      }
      const C* const c = (const C*)codes.rows + j * d;
      d8 squares = {}, rests = {}, norms = {};
      for (int64_t k = 0; k < d; k += 8) {
        const d8 scaled = (upto8(c + k, d - k) - load8(codes.centre + k)) * codes.scale,
                 shifted = scaled + kRound, h = shifted - kRound, rest = scaled - h;
        squares += scaled * scaled;
        rests += rest * rest;
        norms += h * h;
        // the lowest bits of the shifted number are the integer
        const i8 low = (i8)shifted;
        const int64_t n = smaller(4, pairs - k / 2);
        for (int64_t q = 0; q < n; ++q)
          out[(k / 2 + q) * kCodes + lane] =
              (int32_t)((uint32_t)low[2 * q + 1] << 16 | ((uint32_t)low[2 * q] & 0xffff));
      }
      codes.half_norms[tile * kCodes + lane] =
          (int32_t)-__builtin_rint(0.5 * sum(squares) * (codes.row_scale / codes.scale));
      const double norm = sum(norms), rest = sum(rests);
      // written so that a NaN stays
      longest = norm <= longest ? longest : norm;
      worst = rest <= worst ? worst : rest;
    }
  }
  spread->packed_norm = __builtin_sqrt(longest) * kSlack;
  // centring and scaling round by 2^-53 each
  spread->residual = __builtin_sqrt(worst) * kSlack + 0x1p-51 * codes.reach * codes.scale;
}

void pack(const Codes& codes, int64_t tile_begin, int64_t tile_end, Spread* spread) {
  return codes.wide ? pack_codes<double>(codes, tile_begin, tile_end, spread)
                    : pack_codes<float>(codes, tile_begin, tile_end, spread);
}

}  // namespace
}  // namespace vqk
