#pragma once

#include "vidtok/common.h"

namespace vidtok {

// Packed indices of the keep[s] best scores of each segment, ascending. Order: score descending
// (−0 equals 0), then index ascending; NaN last.
struct TopkSelectArgs {
  const void* score;  // [n]
  DType dtype;
  int64_t n;
  const int64_t* keep;  // [keeps]; one entry serves every segment
  int64_t keeps;
  const int32_t* cu_seqlens;  // [segments + 1], or null for one segment
  int64_t segments;
  int64_t* index;  // [sum of keep]
  int threads;
};

Status topk_select(const TopkSelectArgs& args);

}  // namespace vidtok
