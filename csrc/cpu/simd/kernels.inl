// Every operator for one instruction set; included by its translation unit.
#include "cpu/isa.h"
#include "cpu/simd/vec.h"
// One line per operator:
#include "cpu/simd/adjacent_similarity.inl"
#include "cpu/simd/attention_topk.inl"
#include "cpu/simd/bipartite.inl"
#include "cpu/simd/cluster_dpc_knn.inl"
#include "cpu/simd/contour_select.inl"
#include "cpu/simd/gram.inl"
#include "cpu/simd/peak.inl"
#include "cpu/simd/plan_apply.inl"
#include "cpu/simd/pool_packed.inl"
#include "cpu/simd/position_remap.inl"
#include "cpu/simd/proportional_attention.inl"
#include "cpu/simd/topk_select.inl"

#define VIDTOK_CONCAT_(a, b) a##b
#define VIDTOK_CONCAT(a, b) VIDTOK_CONCAT_(a, b)

namespace vidtok {

extern const Kernels VIDTOK_CONCAT(kernels_, VIDTOK_ISA);
const Kernels VIDTOK_CONCAT(kernels_, VIDTOK_ISA) = {
    VIDTOK_ISA::attention_topk_kernels,
    VIDTOK_ISA::bipartite_kernels,
    VIDTOK_ISA::plan_apply_kernels,
    VIDTOK_ISA::position_remap_kernels,
    VIDTOK_ISA::topk_select_kernels,
    VIDTOK_ISA::pool_packed_kernels,
    VIDTOK_ISA::adjacent_similarity_kernels,
    VIDTOK_ISA::gram_kernels,
    VIDTOK_ISA::cluster_kernels,
    VIDTOK_ISA::contour_kernels,
    VIDTOK_ISA::peak_kernels,
    VIDTOK_ISA::proportional_attention_kernels,
};

}  // namespace vidtok
