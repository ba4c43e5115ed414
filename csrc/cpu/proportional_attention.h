// What each instruction set supplies to proportional_attention.
#pragma once

#include "vidtok/proportional_attention.h"

namespace vidtok {

struct ProportionalAttentionKernels {
  // Floats of workspace that a thread needs.
  int64_t (*workspace)(DType dtype, int64_t keys, int64_t dim);
  // Rows [begin, end) of one head. The workspace is aligned to 64 bytes.
  void (*head)(const ProportionalAttentionArgs& a, int64_t batch, int64_t head, int64_t begin, int64_t end,
               float* workspace);
};

}  // namespace vidtok
