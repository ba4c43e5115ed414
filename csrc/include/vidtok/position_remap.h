#pragma once

#include "vidtok/common.h"

namespace vidtok {

// A tensor [outer, n, inner] of any element type, moved as bytes.
struct RemapTensor {
  const void* x;
  void* y;               // [outer, m, inner]
  int64_t outer, inner;  // inner in bytes
  int64_t element;       // bytes of one element: 1, 2, 4 or 8
  uint64_t fill;         // its bits where anchor is −1
};

// y[o, i] = x[o, anchor[i]], `fill` where anchor is −1.
struct PositionRemapArgs {
  const int32_t* anchor;  // [m]
  int64_t n, m;
  const RemapTensor* tensors;
  int64_t count;
  int threads;
};

Status position_remap(const PositionRemapArgs& args);

}  // namespace vidtok
