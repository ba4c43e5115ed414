#pragma once

#include "vidtok/common.h"

namespace vidtok {

enum class ContourRule : int { stratified = 0, contour = 1, contour_fps = 2 };

// Frames of each sequence nearest the lower median of their squared Mahalanobis distances.
struct ContourSelectArgs {
  const void* x;  // [n, c], rows x_stride elements apart
  DType dtype;
  int64_t n, c, x_stride;
  const int32_t* cu_seqlens;  // [sequences + 1], or null for one sequence of n
  int64_t sequences;
  const int64_t* num;  // [num_counts]
  int64_t num_counts;  // sequences, or 1 for all alike
  const void* query;   // [sequences, c] of the same dtype, or null
  int64_t max_rank;
  // Of each sequence [c, r] with columns padded by zeros to a multiple of 8; r = min(max_rank, frames/4, c).
  const double* const* basis;
  ContourRule rule;
  int64_t* index;   // [sum of num]
  float* distance;  // [n]
  int threads;
};

Status contour_select(const ContourSelectArgs& args);

}  // namespace vidtok
