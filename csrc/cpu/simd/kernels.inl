// Every operator for one instruction set; included by its translation unit.
#include "cpu/isa.h"
#include "cpu/simd/vec.h"
// One line per operator:
#include "cpu/simd/bipartite.inl"
#include "cpu/simd/peak.inl"
#include "cpu/simd/plan_apply.inl"

#define VIDTOK_CONCAT_(a, b) a##b
#define VIDTOK_CONCAT(a, b) VIDTOK_CONCAT_(a, b)

namespace vidtok {

extern const Kernels VIDTOK_CONCAT(kernels_, VIDTOK_ISA);
const Kernels VIDTOK_CONCAT(kernels_, VIDTOK_ISA) = {
    VIDTOK_ISA::bipartite_kernels,
    VIDTOK_ISA::plan_apply_kernels,
    VIDTOK_ISA::peak_kernels,
};

}  // namespace vidtok
