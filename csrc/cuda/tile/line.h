// Work that is one line of accesses, cut into equal blocks, so that rows of any length fill the threads.
#pragma once

#include "cuda/tile/types.h"

namespace vidtok::cuda {

// Access `start + step` of the line, as (row, column); start is the same for the block, step is below 2^31.
struct LineAt {
  int64_t row;
  int64_t column;
  VIDTOK_DEVICE LineAt(int64_t start, int per_row, int step) {
    const int64_t first = start / per_row;
    const unsigned in_row = unsigned(start - first * per_row) + unsigned(step);
    row = first + in_row / unsigned(per_row);
    column = in_row % unsigned(per_row);
  }
};

}  // namespace vidtok::cuda
