#pragma once

#include "vidtok/cuda.h"
#include "vidtok/plan_apply.h"

namespace vidtok::cuda {

struct PlanApplyChoice {
  int threads;
  int vectors;  // accesses of a thread that are under way together
};

// Lists lie on the device; `threads` of the arguments is not read.
Status plan_apply(const PlanApplyArgs& args, const PlanApplyChoice& choice, const Launch& on);

// workspace: plan_apply_backward_workspace(args) bytes.
int64_t plan_apply_backward_workspace(const PlanApplyArgs& args);
Status plan_apply_backward(const PlanApplyArgs& args, void* workspace, const PlanApplyChoice& choice, const Launch& on);

}  // namespace vidtok::cuda
