// Rows turned into columns, so that one vector holds one channel of kWidth rows.
#pragma once

#include "cpu/simd/vec.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

#if VIDTOK_WIDTH == 16
VIDTOK_INLINE void transpose_square(vec (&r)[16]) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88),
                 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#elif VIDTOK_WIDTH == 8
VIDTOK_INLINE void transpose_square(vec (&r)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256d a = _mm256_castps_pd(t[i]), b = _mm256_castps_pd(t[i + 1]);
    const __m256d c = _mm256_castps_pd(t[i + 2]), d = _mm256_castps_pd(t[i + 3]);
    u[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    u[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    u[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    u[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}
#else
VIDTOK_INLINE void transpose_square(vec (&)[1]) {}
#endif

// out[k * stride + i] = row[i][k] for k in [0, c); a null row gives zeros.
template <class T>
VIDTOK_INLINE void transpose(const T* const* row, int64_t c, float* out, int64_t stride) {
  for (int64_t k = 0; k < c; k += kWidth) {
    const int n = c - k < kWidth ? int(c - k) : kWidth;
    vec r[kWidth];
    for (int i = 0; i < kWidth; ++i)
      r[i] = row[i] == nullptr ? zero() : n == kWidth ? load(row[i] + k) : load(row[i] + k, n);
    transpose_square(r);
    for (int i = 0; i < n; ++i) store(out + (k + i) * stride, r[i]);
  }
}

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
