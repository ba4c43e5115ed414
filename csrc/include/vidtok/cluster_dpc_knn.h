#pragma once

#include "vidtok/common.h"

namespace vidtok {

// Density peaks of each segment of x: for every token the rank of its centre, and the centres by rank.
struct ClusterDpcKnnArgs {
  const void* x;  // [n, c], rows x_stride elements apart
  DType dtype;
  int64_t n, c, x_stride;
  const int32_t* cu_seqlens;  // [segments + 1], or null for one segment of n
  int64_t segments;
  const int64_t* num_clusters;  // [num_counts]
  int64_t num_counts;           // segments, or 1 for all alike
  int64_t k;
  int64_t* assignment;  // [n]
  int64_t* center;      // [sum of num_clusters]
  int64_t workspace;    // bytes that the call may use besides a few per token
  int threads;
};

Status cluster_dpc_knn(const ClusterDpcKnnArgs& args);

}  // namespace vidtok
