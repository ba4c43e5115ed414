// Cosines as every backend takes them: raw products scaled by the norms in fp32, then rounded to a grid on which equal
// rows tie exactly.
#pragma once

#include "cuda/tile/types.h"

namespace vidtok::cuda {

// To the nearest integer, ties to even.
VIDTOK_DEVICE float nearest_even(float x) {
#if defined(VIDTOK_HOST)
  return __builtin_nearbyintf(x);
#else
  return rintf(x);
#endif
}

// 1/‖row‖ of a squared norm: 0 for a zero row, NaN where the square is not finite.
VIDTOK_DEVICE float inverse_norm(float square) {
  if (square == 0.0f) return 0.0f;
  return square < infinity<float>() ? 1.0f / sqrtf(square) : bits_as<float>(0x7fc00000u);
}

// Steps between 0 and 1 on the grid of a dtype.
template <class T>
constexpr float kCosineSteps = sizeof(T) == 4 ? 1048576.0f : 65536.0f;

// Clamped to [−1, 1] and on the grid; NaN stays.
template <class T>
VIDTOK_DEVICE float round_cosine(float x) {
  const float inside = x > 1.0f ? 1.0f : x < -1.0f ? -1.0f : x;
  return nearest_even(inside * kCosineSteps<T>) / kCosineSteps<T>;
}

}  // namespace vidtok::cuda
