#pragma once

#include "vidtok/cuda.h"

namespace vidtok::cuda {

struct PoolPackedChoice {
  int threads;
  int vectors;  // members of a window whose loads are under way together
};

// As vidtok/pool_packed.h, with grids that the caller has laid out and checked.
struct PoolPackedArgs {
  const void* x;  // [num_in, c], rows x_stride elements apart
  void* y;        // [num_out, c]
  DType dtype;
  int64_t num_in, num_out, c, x_stride;
  const int64_t* grids;  // [videos, 7] on the device: first token before and after, t, h, w, h', w'; sides below 2^16
  int64_t videos;
};

Status pool_packed(const PoolPackedArgs& args, const PoolPackedChoice& choice, const Launch& on);

// The transpose: x is dL/dy [num_out, c], y is dL/dx [num_in, c].
Status pool_packed_backward(const PoolPackedArgs& args, const PoolPackedChoice& choice, const Launch& on);

}  // namespace vidtok::cuda
