#pragma once

#include "vidtok/common.h"

namespace vidtok {

// Adaptive average pooling of every (h, w) map of packed grids (t, h, w) to (t, h', w'):
// window i covers [⌊i·h/h'⌋, ⌈(i + 1)·h/h'⌉). Sums in fp32.
struct PoolPackedArgs {
  const void* x;  // [num_in, c], rows x_stride elements apart
  void* y;        // [num_out, c]
  DType dtype;
  int64_t num_in, num_out, c, x_stride;
  const int64_t* grid_in;   // [videos, 3]
  const int64_t* grid_out;  // [videos, 3]
  int64_t videos;
  int threads;
};

Status pool_packed(const PoolPackedArgs& args);

// The transpose: x is dL/dy [num_out, c], y is dL/dx [num_in, c]; every entry of y is written.
Status pool_packed_backward(const PoolPackedArgs& args);

}  // namespace vidtok
