// What each instruction set supplies to plan_apply.
#pragma once

#include "vidtok/plan_apply.h"

namespace vidtok {

struct PlanApplyKernels {
  // Outputs [begin, end); `streaming` when the output is too large to stay in the cache.
  void (*rows)(const PlanApplyArgs& args, int64_t begin, int64_t end, bool streaming);
};

}  // namespace vidtok
