// What each instruction set supplies to position_remap.
#pragma once

#include "vidtok/position_remap.h"

namespace vidtok {

struct PositionRemapKernels {
  // Entries [begin, end) of one outer row of one tensor.
  void (*entries)(const RemapTensor& tensor, const int32_t* anchor, int64_t n, int64_t m, int64_t outer, int64_t begin,
                  int64_t end, bool streaming);
};

}  // namespace vidtok
