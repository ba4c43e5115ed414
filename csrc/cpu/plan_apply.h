// What each instruction set supplies to plan_apply.
#pragma once

#include "vidtok/plan_apply.h"

namespace vidtok {

struct PlanApplyKernels {
  // Outputs [begin, end); `streaming` when the output is too large to stay in the cache.
  void (*rows)(const PlanApplyArgs& args, int64_t begin, int64_t end, bool streaming);
  // Channels [begin, end) of every input: one owner per channel keeps the order of sums fixed.
  void (*backward_channels)(const PlanApplyArgs& args, int64_t begin, int64_t end);
};

}  // namespace vidtok
