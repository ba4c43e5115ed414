// What each instruction set supplies to pool_packed.
#pragma once

#include "vidtok/pool_packed.h"

namespace vidtok {

// One video: its first token before and after pooling, its sides before and after.
struct PoolGrid {
  int64_t in, out, t, h, w, oh, ow;
};

struct PoolPackedKernels {
  // Output row i (of oh) of frame f.
  void (*row)(const PoolPackedArgs& args, const PoolGrid& grid, int64_t f, int64_t i, bool streaming);
  // Input row r (of h) of frame f.
  void (*backward_row)(const PoolPackedArgs& args, const PoolGrid& grid, int64_t f, int64_t r, bool streaming);
};

}  // namespace vidtok
