// AVX-512 F, BW, DQ, VL and CD.
#define VIDTOK_ISA avx512
#define VIDTOK_WIDTH 16
#include "cpu/simd/kernels.inl"
