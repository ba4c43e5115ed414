#pragma once

#include "vidtok/cluster_dpc_knn.h"
#include "vidtok/cuda.h"

namespace vidtok::cuda {

struct ClusterDpcKnnChoice {
  int tile;  // tokens a side of the products that a block makes
  int warps;
  int stages;  // steps of channels under way
};

// Lists lie on the device; `threads` of the arguments is not read, `workspace` bounds the bytes of distances. cu_host:
// the offsets where the host knows them, else null; num_center: places for centres.
struct ClusterDpcKnnCall {
  ClusterDpcKnnArgs args;
  const int32_t* cu_host;
  int64_t num_center;
};

// Bytes of `workspace` below.
int64_t cluster_dpc_knn_workspace(const ClusterDpcKnnCall& call);
Status cluster_dpc_knn(const ClusterDpcKnnCall& call, void* workspace, const ClusterDpcKnnChoice& choice,
                       const Launch& on);

}  // namespace vidtok::cuda
