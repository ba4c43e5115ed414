#pragma once

#include "vidtok/common.h"

namespace vidtok {

enum class SimilarTo : int { previous = 0, window = 1, center = 2 };

// Cosine in fp32, rounded to the grid of the dtype, of tokens with the same slot in other frames, or
// with a centre. −inf where no pair exists; 0 for a zero row; NaN for a row whose norm is not finite.
struct AdjacentSimilarityArgs {
  const void* x;  // [n, c], rows x_stride elements apart
  float* y;       // [n], or [sum of h·w] per segment and slot for `window`
  DType dtype;
  int64_t n, c, x_stride;
  const int64_t* grid;  // [videos, 3]; not read for `center`
  int64_t videos;
  SimilarTo to;
  const int64_t* window;  // [windows] frames per segment
  int64_t windows;
  const void* center;         // [sequences, c] contiguous
  const int32_t* cu_seqlens;  // [sequences + 1]
  int64_t sequences;
  int64_t num_out;
  int threads;
};

Status adjacent_similarity(const AdjacentSimilarityArgs& args);

}  // namespace vidtok
