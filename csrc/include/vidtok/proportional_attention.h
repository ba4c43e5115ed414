#pragma once

#include "vidtok/common.h"

namespace vidtok {

// softmax(scale·q·kᵀ + bias)·v, where the bias of a key is the same for all rows and heads: the logarithm of how
// many tokens it stands for, −∞ where it is hidden. A row without any key gives zeros. Sums in fp32; bf16 weights
// are rounded before they meet the values, as fused attention rounds them. Strides are in elements; the last
// dimension is contiguous.
struct ProportionalAttentionArgs {
  const void* q;  // [batch, heads, rows, dim]
  const void* k;  // [batch, heads, keys, dim]
  const void* v;  // [batch, heads, keys, dim]
  DType dtype;
  int64_t batch, heads, rows, keys, dim;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, head, row
  const float* bias;                              // [batch, keys], or null
  int64_t bias_stride;                            // 0 where all of the batch share it
  float scale;
  void* out;  // [batch, rows, heads, dim]
  int threads;
};

Status proportional_attention(const ProportionalAttentionArgs& args);

}  // namespace vidtok
