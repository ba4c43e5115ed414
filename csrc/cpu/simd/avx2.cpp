// AVX2, FMA and F16C.
#define VIDTOK_ISA avx2
#define VIDTOK_WIDTH 8
#include "cpu/simd/kernels.inl"
