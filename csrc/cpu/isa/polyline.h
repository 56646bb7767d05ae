// The polyline as its search wants it: nodes in tiles, and what each segment bends its score by.
#pragma once

#include "../kernels.h"
#include "convert.h"
#include "scratch.h"
#include "segment_literal.h"
#include "simd.h"

namespace vqk {
namespace {

// segments of a tile; their two sums of products each fill the registers
#if defined(__AVX512F__)
constexpr int kNodes = 12;
#else
constexpr int kNodes = 6;
#endif
// tile i searches segments i kNodes - 1 .. (i + 1) kNodes - 2, between this many nodes
constexpr int kEnds = kNodes + 1;

// beyond these powers of two the contract's own sums may underflow
constexpr int kMostExponent = 300;
// a scaled segment shorter than this is as good as a point, and its inverse could overflow
constexpr double kShortest = 0x1p-150;

VQK_INLINE bool usable(const Polyline& line, int64_t s) {
  return s >= 0 && s + 1 < line.count && line.kinds[s] != kNever && line.kinds[s + 1] != kNever;
}

// usable, and not set apart
VQK_INLINE bool searched(const Polyline& line, int64_t s) {
  return s >= 0 && s + 1 < line.count && line.kinds[s] == kUsual && line.kinds[s + 1] == kUsual;
}

void copy_codes(const Rows& codebook, int64_t begin, int64_t end, bool wide, void* out) {
  const int64_t d = codebook.features;
  if (wide)
    load(codebook, begin, end - begin, (double*)out + begin * d, d);
  else
    load(codebook, begin, end - begin, (float*)out + begin * d, d);
}

template <class C>
void survey_codes(const Polyline& line, int64_t begin, int64_t end, double* norms) {
  const int64_t d = line.features;
  for (int64_t j = begin; j < end; ++j) {
    const C* const c = (const C*)line.rows + j * d;
    line.kinds[j] = finite(c, d) ? kUsual : kNever;
    if (line.kinds[j] == kNever) continue;
    // two sums hide each other's latency
    d8 squares = {}, others = {};
    int64_t k = 0;
    for (; k + 16 <= d; k += 16) {
      const d8 v = load8(c + k) - load8(line.centre + k), w = load8(c + k + 8) - load8(line.centre + k + 8);
      squares += v * v;
      others += w * w;
    }
    double square = sum(squares + others);
    for (; k < d; ++k) {
      const double v = (double)c[k] - line.centre[k];
      square += v * v;
    }
    norms[j] = __builtin_sqrt(square);
  }
}

void survey(const Polyline& line, int64_t begin, int64_t end, double* norms) {
  return line.wide ? survey_codes<double>(line, begin, end, norms)
                   : survey_codes<float>(line, begin, end, norms);
}

// a maximum that a NaN replaces and then stays
VQK_INLINE void grow(double& most, double v) { most = v <= most ? most : v; }

// squares of one code: centred and scaled, what float32 leaves of that, and the code itself, scaled
struct Squares {
  double centred, residual, plain;
};

template <class C>
Squares pack_node(const Polyline& line, const C* c, float* out) {
  const int64_t d = line.features;
  d8 centred = {}, residual = {}, plain = {};
  int64_t k = 0;
  for (; k + 8 <= d; k += 8) {
    const d8 raw = load8(c + k), v = (raw - load8(line.centre + k)) * line.scale, p = raw * line.scale;
    const f8 h = __builtin_convertvector(v, f8);
    const d8 r = v - __builtin_convertvector(h, d8);
    centred += v * v;
    residual += r * r;
    plain += p * p;
    for (int q = 0; q < 8; ++q) out[(k + q) * kEnds] = h[q];
  }
  Squares squares = {sum(centred), sum(residual), sum(plain)};
  for (; k < d; ++k) {
    const double v = ((double)c[k] - line.centre[k]) * line.scale, p = (double)c[k] * line.scale;
    const float h = (float)v;
    const double r = v - (double)h;
    squares.centred += v * v;
    squares.residual += r * r;
    squares.plain += p * p;
    out[k * kEnds] = h;
  }
  return squares;
}

// segments of one tile: lengths, and the three constants of nearest_segment.cpp
template <class C>
void pack_bends(const Polyline& line, int64_t tile, double& longest) {
  float* const bends = line.bends + tile * 3 * kNodes;
  for (int first = 0; first < kNodes; first += kSums) {
    const C* codes[kSums];
    double length[kSums];
    bool any = false;
    for (int p = 0; p < kSums; ++p) {
      const int64_t s = tile * kNodes - 1 + first + p;
      const bool wanted = first + p < kNodes && usable(line, s);
      codes[p] = (const C*)line.rows + (wanted ? s : 0) * line.features;
      any |= wanted;
    }
    if (any) lengths(codes, line.features, length);
    for (int p = 0; p < kSums && first + p < kNodes; ++p) {
      const int64_t s = tile * kNodes - 1 + first + p;
      float* const bend = bends + first + p;
      // a node that ends a searched segment stands for itself; any other scores NaN, which never wins
      const float level = searched(line, s - 1) ? 0 : __builtin_nanf("");
      bend[0] = 0, bend[kNodes] = 0, bend[2 * kNodes] = level;
      if (usable(line, s)) line.length[s] = length[p];
      if (!searched(line, s)) continue;
      const double half = 0.5 * length[p] * line.scale * line.scale;
      grow(longest, half);
      bend[2 * kNodes] = 0;
      if (!(half >= kShortest)) continue;
      const double root = __builtin_sqrt(half);
      bend[0] = (float)(0.5 / root);
      bend[kNodes] = (float)(0.5 * root);
      bend[2 * kNodes] = 2 * bend[kNodes];
    }
  }
}

template <class C>
void pack_tiles(const Polyline& line, int64_t tile_begin, int64_t tile_end, PolylineSpread* spread) {
  const int64_t d = line.features;
  double norm = 0, residual = 0, far = 0, longest = 0;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int end = 0; end < kEnds; ++end) {
      const int64_t j = tile * kNodes - 1 + end;
      float* const out = line.packed + tile * d * kEnds + end;
      float* const bias = line.bias + tile * kEnds + end;
      if (j < 0 || j >= line.count || line.kinds[j] != kUsual) {
        for (int64_t k = 0; k < d; ++k) out[k * kEnds] = 0;
        *bias = 0;
        continue;
      }
      const Squares squares = pack_node(line, (const C*)line.rows + j * d, out);
      *bias = (float)(-0.5 * squares.centred);
      grow(norm, squares.centred);
      grow(residual, squares.residual);
      grow(far, squares.plain);
    }
    pack_bends<C>(line, tile, longest);
  }
  spread->norm = __builtin_sqrt(norm) * kSlack;
  spread->residual = __builtin_sqrt(residual) * kSlack + 0x1p-52 * spread->norm;
  spread->far = __builtin_sqrt(far) * kSlack;
  spread->half_length = longest * kSlack;
}

void pack(const Polyline& line, int64_t tile_begin, int64_t tile_end, PolylineSpread* spread) {
  return line.wide ? pack_tiles<double>(line, tile_begin, tile_end, spread)
                   : pack_tiles<float>(line, tile_begin, tile_end, spread);
}

}  // namespace
}  // namespace vqk
