#pragma once

#include "vidtok/common.h"

namespace vidtok {

// y[m] = sum of weight[j] · x[member[j]] over j in [offset[m], offset[m + 1]), in fp32.
// Without lists (member null) y[m] = x[anchor[m]], zeros where anchor is −1.
struct PlanApplyArgs {
  const void* x;  // [n, c], rows x_stride elements apart
  void* y;        // [m, c]
  DType dtype;
  int64_t n, m, c, x_stride;
  const int32_t* anchor;  // [m]
  const int32_t* member;  // [nnz] or null
  const int32_t* offset;  // [m + 1]
  const float* weight;    // [nnz]
  int64_t nnz;
  int threads;
  // Whether a single member is weighted too; a plan's single member is a copy whatever its weight.
  bool weigh_single = false;
};

Status plan_apply(const PlanApplyArgs& args);

// The transpose: y is dL/dx [n, c], x is dL/dy [m, c]; every entry of y is written.
Status plan_apply_backward(const PlanApplyArgs& args);

}  // namespace vidtok
