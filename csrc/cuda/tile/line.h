// Work that is one line of accesses, cut into equal blocks, so that rows of any length fill the threads.
#pragma once

#include "cuda/tile/types.h"

namespace vidtok::cuda {

// Access `start` of the line, which is the same for the block: what takes a long division is made once.
struct LineStart {
  int64_t row;
  unsigned column, per_row;
  VIDTOK_DEVICE LineStart(int64_t start, int accesses) : row(start / accesses), per_row(unsigned(accesses)) {
    column = unsigned(start - row * accesses);
  }
};

// Access `start + step` of the line, as (row, column); step is below 2^31.
struct LineAt {
  int64_t row;
  int64_t column;
  VIDTOK_DEVICE LineAt(const LineStart& start, int step) {
    const unsigned in_row = start.column + unsigned(step), rows = in_row / start.per_row;
    row = start.row + rows;
    column = in_row - rows * start.per_row;
  }
};

}  // namespace vidtok::cuda
