// Packed tokens and their dot products, which the clustering kernels share.
//
// Tokens are packed in panels: kPanel tokens side by side, channel after channel, so that one vector
// holds the same channel of kPanel tokens. A dot product is a sum over blocks of kGramBlock words;
// within a block it is sequential. So it has the same bits wherever its two tokens stand, for (i, j)
// as for (j, i), and equals the squared norm that packing adds up when the tokens are equal.
//
// With AVX512-BF16, bf16 channels are multiplied in pairs: products are exact, each of the two additions
// rounds to nearest even like fp32, and subnormal sums count as zero.
#pragma once

#include <cstdint>

#include "vidtok/common.h"

namespace vidtok {

// Words per partial sum: fp32 channels, or pairs of bf16 channels where those are multiplied directly.
constexpr int64_t kGramBlock = 256;

struct GramPack {
  const void* x;
  DType dtype;
  int64_t x_stride, c;
  const int32_t* token;  // rows of x to pack, or null for 0, 1, 2, …
  int64_t count;
  int64_t begin, end;  // words of the channel axis to pack; begin is a multiple of kGramBlock
  float* out;          // [blocks][panels][kGramBlock][kPanel]
  float* norm;         // squared norms so far, [panels · kPanel], or null
};

struct GramTile {
  const float* a;  // packed rows
  const float* b;  // packed columns
  int64_t a_panels, b_panels;
  int64_t words;  // packed words per token, a multiple of the panel
  float* g;       // [rows, ldg], padded to whole panels
  int64_t ldg;
  int64_t row_begin, row_end;  // row_begin at a panel
  int64_t panel_begin, panel_end;
  bool first;      // g is written, not added to
  bool symmetric;  // only panels at or right of the row's own
};

// Turns dots into distance units in place: u = round((nᵢ + nⱼ − 2g)·factor) within [least, largest],
// largest when not finite, 0 on the diagonal and outside the tokens.
struct GramUnits {
  float* g;
  int64_t ldg;
  float* mirror;  // also receives the transpose; null for none
  int64_t ldm;
  const float* row_norm;
  const float* col_norm;
  int64_t rows, cols;            // tokens
  float factor, largest, least;  // least = largest makes every distance the largest
  int64_t row_begin, row_end, panel_begin, panel_end;
  bool symmetric;
};

struct GramKernels {
  int panel;
  // Words per token: pairs of channels when the set multiplies bf16 directly.
  int64_t (*words)(DType dtype, int64_t c);
  void (*pack)(const GramPack& args, int64_t panel_begin, int64_t panel_end, int64_t panels);
  void (*tile)(const GramTile& args, DType dtype);
  void (*units)(const GramUnits& args);
};

// A set of tokens: rows of x from `begin` on, or those that `token` names.
struct GramSide {
  const int32_t* token;
  int64_t begin, count;
  float* packed;  // room for panels · slab words
  float* norm;    // squared norms, padded to whole panels
};

struct GramScale {
  float factor;  // units per squared distance
  double unit;   // ‖xᵢ − xⱼ‖²/C = units · unit
};

// Units of every pair of rows and columns; of a symmetric block, both triangles.
struct GramBlock {
  const void* x;
  DType dtype;
  int64_t x_stride, c;
  GramSide rows, cols;  // cols is not read when symmetric
  bool symmetric;
  float* g;  // [rows, ldg], both padded to whole panels
  int64_t ldg;
  float* mirror;  // the transpose [cols, ldm], or null; not read when symmetric
  int64_t ldm;
  int64_t slab;  // words packed at a time, a multiple of kGramBlock
  bool measure;  // find the norms of the rows and the scale, else take them as given
  GramScale scale;
  int threads;
};

// The largest distance in units; what is not finite counts as it.
inline constexpr float kGramLargest = 4194304.0f;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Words per packed token, whole panels.
int64_t gram_words(DType dtype, int64_t c);
GramScale gram_scale(const float* norm, int64_t count, int64_t c);
void gram_block(GramBlock& block);

}  // namespace vidtok
