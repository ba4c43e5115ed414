// Which instruction set serves, and the table of its kernels.
#pragma once

#include "cpu/adjacent_similarity.h"
#include "cpu/attention_topk.h"
#include "cpu/bipartite.h"
#include "cpu/cluster_dpc_knn.h"
#include "cpu/contour_select.h"
#include "cpu/gram.h"
#include "cpu/peak.h"
#include "cpu/plan_apply.h"
#include "cpu/pool_packed.h"
#include "cpu/position_remap.h"
#include "cpu/proportional_attention.h"
#include "cpu/topk_select.h"

namespace vidtok {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };
inline constexpr int kIsaCount = 4;
inline constexpr const char* kIsaNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512bf16"};

// One entry per operator; each instruction set's translation unit fills one such table.
struct Kernels {
  AttentionTopkKernels attention_topk;
  BipartiteKernels bipartite;
  PlanApplyKernels plan_apply;
  PositionRemapKernels position_remap;
  TopkSelectKernels topk_select;
  PoolPackedKernels pool_packed;
  AdjacentSimilarityKernels adjacent_similarity;
  GramKernels gram;
  ClusterKernels cluster;
  ContourKernels contour;
  PeakKernels peak;
  ProportionalAttentionKernels proportional_attention;
};

extern const Kernels kernels_scalar;
#ifdef VIDTOK_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif

// Whether this processor and its operating system can run exactly what the unit was compiled for.
bool supported(Isa isa);
// The best supported set, or the one that VIDTOK_CPU_ISA names.
Isa current_isa();
// Returns false when the set is not supported here; meant for tests.
bool set_isa(Isa isa);
const Kernels& kernels();

}  // namespace vidtok
