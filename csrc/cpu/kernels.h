// The bodies that are compiled once per instruction set, behind one table of functions.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "rows.h"

namespace vqk {

// a code that can never win: not finite, or equal to an earlier one; one that is searched; one so long
// that it is set apart
enum Kind : uint8_t { kNever, kUsual, kFar };

// codes as the search wants them; every array is owned by the caller
struct Codes {
  int64_t count, features;  // K and D
  const void* rows;         // (K, D) contiguous, the codes themselves
  bool wide;                // rows are float64, else float32
  bool centred;             // the centre is not 0
  const double* centre;     // (D padded to 8), taken from codes and rows alike
  uint8_t* kinds;           // (K) of Kind
  int64_t first_finite;     // -1: no code is finite
  double reach;             // longest |c - centre| of a usual code
  double scale, row_scale;  // of codes and of rows; see isa/bounds.h
  double packed_norm;       // longest packed code
  double residual;          // largest distance of a scaled code from its packed one
  const int64_t* far;       // codes too long for the scale of the others
  int64_t far_count;
  double far_reach;     // shortest |c - centre| of these
  int32_t* packed;      // (tiles, pairs of features, codes of a tile), int16 each
  int32_t* half_norms;  // (tiles, codes of a tile), negative
  uint16_t* absent;     // (tiles): a bit for each place without a code that can win
};

// maxima over codes; a chunk of codes fills one
struct Spread {
  double largest;  // of |c_d - centre_d|, c_d a feature
  double packed_norm, residual;
};

struct Search {
  Rows x;
  Codes codes;
  bool exact;
  int64_t chunk;     // tiles of codes that stay in the second cache
  int64_t* indices;  // (N); -1 marks a row that the search leaves open
  void* sq_dist;     // (N)
  bool wide;         // sq_dist is float64, else float32
};

// the polyline through the codes as its search wants it; every array is owned by the caller
struct Polyline {
  int64_t count, features;  // K and D
  const void* rows;         // (K, D) contiguous, the codes themselves
  bool wide;                // rows are float64, else float32
  const double* centre;     // (D padded to 8), taken from codes and rows alike
  double scale;             // power of two, brings centred codes near 1
  int exponent;             // log2 of scale
  uint8_t* kinds;           // (K) of Kind; kNever: not finite
  int64_t first_usable;     // -1: no segment has two finite codes
  const int64_t* apart;     // segments of finite codes, of which one or both are far, in order
  int64_t apart_count;
  double* length;  // (K - 1), |c_{s+1} - c_s|^2
  float* packed;   // (tiles, D, nodes + 1): the codes of each tile's segments
  float* bias;     // (tiles, nodes + 1), -|c|^2 / 2
  float* bends;    // (tiles, 3, nodes): see isa/nearest_segment.cpp
};

// maxima over usual codes, and segments of them, that bound the error of a score, in scaled units; a chunk of
// codes fills one
struct PolylineSpread {
  double norm;         // of |c|
  double residual;     // of |c - float32(c)|
  double far;          // of |c| without its centring
  double half_length;  // of |c_{s+1} - c_s|^2 / 2
};

struct SegmentSearch {
  Rows x;
  Polyline line;
  PolylineSpread spread;
  int64_t* segments;  // (N); -1 marks a row that the search leaves open
  void* position;     // (N)
  void* sq_dist;      // (N)
  bool wide;          // position and sq_dist are float64, else float32
};

struct Directional {
  Rows x, z, grad;  // z is grad_x in the backward pass
  Rows codebook;    // batch 1
  Rows indices;     // int64, features 1; type is not used
  Rows position;    // features 1; data null: one point per row
  uint64_t seed;
  int direction;  // 0 noisy, 1 detach, 2 random
  double noise_std;
  int64_t row_offset;
  bool wide;       // arithmetic in float64, else float32
  int64_t* codes;  // backward: (points, N) code of each point, -1 where it has no gradient
  double* pull;    // backward: (points, N) w (g . u) / r
};

// rows whose squares are added up together, so that a total does not vary with the threads
constexpr int64_t kTotals = 64;

struct StraightThrough {
  Rows x, z, grad;  // z is grad_x in the backward pass
  Rows codebook;    // batch 1
  Rows indices;     // int64, features 1; type is not used
  bool wide;        // arithmetic in float64, else float32
  void* sq_dist;    // forward: (N), float64 if wide, else float32
  double* totals;   // forward: (N / kTotals, 2) at the first row of each range: sum of squares, rows
  bool rotation;    // backward
  double by;        // backward: of x - c in dL/dx
  int64_t* codes;   // backward: (N) code of each row, -1 where it has no gradient; null: not wanted
};

// sums of rows per code: of x itself, or of pull * (c - x)
struct Sums {
  Rows x;
  Rows codebook;          // data null: x itself
  const double* pull;     // by entry; row = entry % N
  const int64_t* by_row;  // code of each entry, -1 for none
  int64_t entries;        // N, or 2 N
  const int64_t* sorted;  // entries by code, for rows that lie together
  const int64_t* starts;  // (K + 1) into sorted
  int64_t codes, chunk;   // chunk: entries at a time
  Rows out;               // (1, K, D)
  double* edges;          // (chunks, 2, D): first and last code of each chunk, when they cross its borders
  bool wide;
};

// what is added up at a time from entries as they come: some features of rows and codes
struct Slab {
  bool across;  // features of a row are further apart than rows
  int64_t feature;
  int64_t code_begin, code_end;
  int64_t row_begin, row_end;
  double* table;  // (codes, features of a slab): the sums; null: they go to out
};

struct NearestCodeKernels {
  int codes;  // in a tile
  int rows;   // in a tile
  // exact codes begin..end of `codebook`, or points of the dithered curve, to `out` (float32, or float64 if
  // wide)
  void (*points)(const Rows& codebook, const Rows& dither, int64_t begin, int64_t end, bool wide, void* out);
  // sets kinds; hashes: equal codes have equal ones; norms: upper bounds of |c - centre|
  void (*survey)(const Codes& codes, int64_t begin, int64_t end, int64_t* hashes, double* norms,
                 Spread* spread);
  void (*scale)(Codes* codes, double largest);
  void (*pack)(const Codes& codes, int64_t tile_begin, int64_t tile_end, Spread* spread);
  // a block of rows: its memory, then three steps in it
  size_t (*search_scratch)(const Search& search, int64_t rows);
  size_t (*slots_size)(int64_t rows);
  void (*pack_rows)(const Search& search, int64_t begin, int64_t end, void* scratch);
  // against some tiles of codes, to the block's own slots or to others
  void (*scores)(const Search& search, int64_t rows, void* scratch, int64_t tile_begin, int64_t tile_end,
                 void* slots);
  // from the block's own slots, or from those of several parts of the codes side by side; how many rows it
  // leaves open
  int64_t (*settle)(const Search& search, int64_t begin, int64_t end, void* scratch, const void* slots,
                    int64_t parts);
  size_t (*rescore_scratch)(int64_t features, int64_t rows);
  void (*rescore)(const Search& search, const int64_t* rows, int64_t count, void* scratch);
};

struct NearestSegmentKernels {
  int nodes;  // segments of a tile
  int rows;   // rows side by side
  // exact codes begin..end of `codebook` to `out` (float32, or float64 if wide)
  void (*copy)(const Rows& codebook, int64_t begin, int64_t end, bool wide, void* out);
  // sets kinds, none far; norms: |c - centre| of those that are finite
  void (*survey)(const Polyline& line, int64_t begin, int64_t end, double* norms);
  void (*pack)(const Polyline& line, int64_t tile_begin, int64_t tile_end, PolylineSpread* spread);
  size_t (*search_scratch)(int64_t features, int64_t rows);
  void (*search)(const SegmentSearch& search, int64_t begin, int64_t end, void* scratch);
  size_t (*rescore_scratch)(int64_t features, int64_t rows);
  void (*rescore)(const SegmentSearch& search, const int64_t* rows, int64_t count, void* scratch);
};

struct DirectionalKernels {
  size_t (*scratch)(int64_t features);
  void (*forward)(const Directional& args, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const Directional& args, int64_t begin, int64_t end, void* scratch);
};

struct StraightThroughKernels {
  size_t (*scratch)(int64_t features);
  void (*forward)(const StraightThrough& args, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const StraightThrough& args, int64_t begin, int64_t end, void* scratch);
  // rows of out = first + share * second; first null: none
  void (*add)(const double* first, double share, const double* second, const Rows& out, int64_t begin,
              int64_t end, void* scratch);
};

struct CodeSumsKernels {
  size_t (*scratch)(int64_t features);
  // codes[n] = -1 where row n has a feature that is not finite
  void (*drop_non_finite)(const Rows& x, int64_t begin, int64_t end, void* scratch, int64_t* codes);
  // the codes that chunk `chunk` of the sorted entries holds as a whole, and the edges of the others
  void (*sums)(const Sums& args, int64_t chunk, void* scratch);
  // the codes in [begin, end) that no chunk held as a whole
  void (*join)(const Sums& args, int64_t begin, int64_t end, void* scratch);
  // features of a slab, 0 where the rows do not allow one
  int (*slab)(const Rows& x, bool wide, bool across);
  size_t (*columns_scratch)(int64_t codes, bool across);
  void (*columns)(const Sums& args, const Slab& slab, void* scratch);
  // tables of all codes that columns() made of consecutive rows, each `apart` from the next, added in this
  // order to out
  void (*add_tables)(const Sums& args, const Slab& first, int64_t tables, int64_t apart);
  // rows as float32 or float64 that lie together
  void (*copy)(const Rows& x, int64_t begin, int64_t end, bool wide, void* out);
};

struct PhiloxKernels {
  // words and normals of rows from `row` on, (rows, blocks, 4) each
  void (*rows)(uint64_t seed, uint64_t row, uint32_t stream, int64_t rows, int64_t blocks, int64_t* words,
               float* normals);
};

// products and sums of one kind that stay in registers
struct Peak {
  const char* name;
  int64_t operations;  // of one turn
  bool (*supported)();
  void (*run)(int64_t turns);
};

struct PeakKernels {
  const Peak* kinds;
  int count;
};

struct Kernels {
  const char* name;
  const NearestCodeKernels* nearest_code;
  const NearestSegmentKernels* nearest_segment;
  const DirectionalKernels* directional;
  const StraightThroughKernels* straight_through;
  const CodeSumsKernels* code_sums;
  const PhiloxKernels* philox;
  const PeakKernels* peaks;
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}

}  // namespace vqk
