#pragma once

#include "vidtok/common.h"
#include "vidtok/cuda.h"

namespace vidtok::cuda {

struct TopkSelectChoice {
  int threads;
};

// Packed indices of the best of each segment, ascending; all pointers are the device's.
struct TopkSelectArgs {
  const void* score;  // [n]
  DType dtype;
  int64_t n;
  const int32_t* cu_seqlens;  // [segments + 1], or null for one segment
  int64_t segments;
  int64_t keep;               // of every segment, where keep_start is null
  const int64_t* keep_start;  // [segments + 1]: sums of the segments' numbers before each
  const int32_t* position;    // [n]: what to write for each index, or null for the index itself
  int64_t* index;             // [sum of the numbers]
};

Status topk_select(const TopkSelectArgs& args, const TopkSelectChoice& choice, const Launch& on);

}  // namespace vidtok::cuda
