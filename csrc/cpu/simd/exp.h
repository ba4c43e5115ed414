// exp of one vector, the same bits for equal inputs in whatever lane.
#pragma once

#include "cpu/simd/vec.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

// p · 2ⁿ for integral n in [−150, 0].
VIDTOK_INLINE vec scale_by_power(vec p, vec n) {
#if VIDTOK_WIDTH == 16
  return {_mm512_scalef_ps(p.v, n.v)};
#elif VIDTOK_WIDTH == 8
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127), rest = _mm256_sub_epi32(whole, half);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(p.v, a), b)};
#else
  if (!(n.v >= -150.0f)) return p;  // NaN
  const int whole = int(n.v), half = whole / 2;
  return {p.v * from_bits(uint32_t(half + 127) << 23) * from_bits(uint32_t(whole - half + 127) << 23)};
#endif
}

// eˣ for x <= 0, to about one unit in the last place; 0 below −104, NaN for NaN. x = n·ln 2 + r with
// |r| <= ln 2 / 2, and the series of eʳ to r⁷/7!.
VIDTOK_INLINE vec exp_nonpositive(vec x) {
  x = max(set1(-104.0f), x);
  const vec n = round(x * set1(1.44269504f));
  vec r = fma(n, set1(-0.693145751953125f), x);  // 15 bits of ln 2: the product is exact
  r = fma(n, set1(-1.42860682e-6f), r);
  vec p = fma(r, set1(1.98412698e-4f), set1(1.38888889e-3f));
  p = fma(p, r, set1(8.33333333e-3f));
  p = fma(p, r, set1(4.16666667e-2f));
  p = fma(p, r, set1(1.66666667e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
