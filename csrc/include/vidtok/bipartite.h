#pragma once

#include "vidtok/common.h"

namespace vidtok {

// Bipartite matching, and with x the merge by it. Sequences are [batch, tokens] or, with `cu`,
// packed rows cu[b]..cu[b + 1] of `tokens` in all. Strides are in elements; rows are contiguous.
struct BipartiteArgs {
  const void* metric;  // rows of cm, or `heads` of them whose mean is taken
  DType metric_dtype;
  int64_t heads, cm, metric_batch, metric_head, metric_row;
  const float* size;    // [n] or null for ones
  const uint8_t* mask;  // [n] protected tokens, or null
  const int32_t* cu;    // [batch + 1] or null
  int64_t batch, tokens, r, prefix;
  const void* x;  // null: match only
  DType x_dtype;
  int64_t c, x_batch, x_row;
  void* y;       // [m, c]
  float* total;  // [m]
  int64_t m;
  // The plan's lists.
  int32_t *cu_in, *cu_out, *anchor, *member, *offset;
  float* weight;
  int threads;
};

// Outputs that the arguments give, in *m; checks `cu`.
Status bipartite_count(const BipartiteArgs& args, int64_t* m);
Status bipartite(const BipartiteArgs& args);

}  // namespace vidtok
