// peak_flops and stream_copy for one instruction set.
#include "cpu/peak.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

// Enough independent sums to fill two pipes of four cycles each.
constexpr int kChains = VIDTOK_WIDTH == 8 ? 12 : 16;

float peak_flops_run(int64_t rounds, float factor, float addend) {
  const vec x = set1(factor), y = set1(addend);
  vec sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = set1(float(i));
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], x, y);
  vec all = zero();
  for (int i = 0; i < kChains; ++i) all = all + sum[i];
  float lanes[kWidth];
  store(lanes, all);
  return lanes[0];
}

void stream_copy_run(const char* x, char* y, int64_t bytes) {
  constexpr int64_t kBytes = kWidth * 4;
  const float* from = reinterpret_cast<const float*>(x);
  float* to = reinterpret_cast<float*>(y);
  const int64_t vectors = bytes / kBytes;
  int64_t i = 0;
  for (; i + 4 <= vectors; i += 4, from += 4 * kWidth, to += 4 * kWidth) {
    const vec a = load(from), b = load(from + kWidth), c = load(from + 2 * kWidth), d = load(from + 3 * kWidth);
    stream(to, a);
    stream(to + kWidth, b);
    stream(to + 2 * kWidth, c);
    stream(to + 3 * kWidth, d);
  }
  std::memcpy(to, from, size_t(bytes - i * kBytes));
  stream_fence();
}

constexpr PeakKernels peak_kernels{int64_t(2) * kChains * kWidth, peak_flops_run, stream_copy_run};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
