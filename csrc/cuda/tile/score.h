// What softmax scores are made of.
#pragma once

#include "cuda/tile/types.h"

namespace vidtok::cuda {

// e^x within one unit in the last place for x <= 0; NaN stays. The hardware's exp2 is coarser, and scores are rounded
// to 16 bits: every bit of error moves more of them across a boundary.
VIDTOK_DEVICE float exp_not_above_0(float x) {
  const float bounded = x < -104.0f ? -104.0f : x;
  const float n = rintf(bounded * 1.4426950408889634f);
  float r = fused(n, -0.693145751953125f, bounded);
  r = fused(n, -1.4286068203094172e-06f, r);
  float y = fused(r, 0.0001984126984126984f, 0.001388888888888889f);
  y = fused(y, r, 0.008333333333333333f);
  y = fused(y, r, 0.041666666666666664f);
  y = fused(y, r, 0.16666666666666666f);
  y = fused(y, r, 0.5f);
  y = fused(y * r, r, r) + 1.0f;
  // 2^n in two halves, as n goes below the least exponent.
  const int whole = x == x ? int(n) : 0, half = whole >> 1;
  y *= bits_as<float>(uint32_t(half + 127) << 23);
  y *= bits_as<float>(uint32_t(whole - half + 127) << 23);
  return x < -104.0f ? 0.0f : y;
}

// A number of at least 0 to 16 significant bits, half to even; NaN and infinity stay.
VIDTOK_DEVICE float round_16_bits(float x) {
  // Subnormal numbers have fewer bits left of the cut: they are brought up by 2^24 and back, both exact.
  const bool small = x < 1.1754943508222875e-38f;
  const uint32_t bits = bits_as<uint32_t>(small ? x * 16777216.0f : x);
  const float rounded = bits_as<float>((bits + 127u + ((bits >> 8) & 1u)) & ~255u);
  if (!(x < infinity<float>())) return x;
  return small ? rounded * 5.9604644775390625e-08f : rounded;
}

}  // namespace vidtok::cuda
