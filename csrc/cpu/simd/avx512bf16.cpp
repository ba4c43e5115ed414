// AVX-512 with BF16 dot products.
#define VIDTOK_ISA avx512bf16
#define VIDTOK_WIDTH 16
#define VIDTOK_BF16_DOT 1
#include "cpu/simd/kernels.inl"
