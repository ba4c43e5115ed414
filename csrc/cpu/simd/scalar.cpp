// No vector instructions beyond the baseline.
#define VIDTOK_ISA scalar
#define VIDTOK_WIDTH 1
#include "cpu/simd/kernels.inl"
