// plan_apply for one instruction set.
#include "cpu/plan_apply.h"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

template <class T>
VIDTOK_INLINE void copy_row(T* y, const T* x, int64_t c, bool streaming) {
#if VIDTOK_WIDTH > 1
  constexpr int64_t kBytes = kWidth * 4;
  char* to = reinterpret_cast<char*>(y);
  const char* from = reinterpret_cast<const char*>(x);
  int64_t left = c * int64_t(sizeof(T));
  if (streaming && left >= 4 * kBytes) {
    const int64_t head = (kBytes - (reinterpret_cast<uintptr_t>(to) & (kBytes - 1))) & (kBytes - 1);
    std::memcpy(to, from, size_t(head));
    to += head, from += head, left -= head;
    for (; left >= 4 * kBytes; to += 4 * kBytes, from += 4 * kBytes, left -= 4 * kBytes) {
      const vec a = load(reinterpret_cast<const float*>(from));
      const vec b = load(reinterpret_cast<const float*>(from + kBytes));
      const vec d = load(reinterpret_cast<const float*>(from + 2 * kBytes));
      const vec e = load(reinterpret_cast<const float*>(from + 3 * kBytes));
      stream(reinterpret_cast<float*>(to), a);
      stream(reinterpret_cast<float*>(to + kBytes), b);
      stream(reinterpret_cast<float*>(to + 2 * kBytes), d);
      stream(reinterpret_cast<float*>(to + 3 * kBytes), e);
    }
  }
  std::memcpy(to, from, size_t(left));
#else
  (void)streaming;
  std::memcpy(y, x, size_t(c) * sizeof(T));
#endif
}

// Four vectors of the output stay in registers while the members pass by.
template <class T>
VIDTOK_INLINE void mean_row(const PlanApplyArgs& a, T* y, const T* x, int32_t begin, int32_t end) {
  int64_t j = 0;
  for (; j + 4 * kWidth <= a.c; j += 4 * kWidth) {
    vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    for (int32_t i = begin; i < end; ++i) {
      const T* row = x + int64_t(a.member[i]) * a.x_stride + j;
      const vec w = set1(a.weight[i]);
      s0 = fma(w, load(row), s0);
      s1 = fma(w, load(row + kWidth), s1);
      s2 = fma(w, load(row + 2 * kWidth), s2);
      s3 = fma(w, load(row + 3 * kWidth), s3);
    }
    store(y + j, s0);
    store(y + j + kWidth, s1);
    store(y + j + 2 * kWidth, s2);
    store(y + j + 3 * kWidth, s3);
  }
  for (; j < a.c; j += kWidth) {
    const int n = a.c - j < kWidth ? int(a.c - j) : kWidth;
    vec s = zero();
    for (int32_t i = begin; i < end; ++i)
      s = fma(set1(a.weight[i]), load(x + int64_t(a.member[i]) * a.x_stride + j, n), s);
    store(y + j, s, n);
  }
}

template <class T>
void plan_apply_rows(const PlanApplyArgs& a, int64_t begin, int64_t end, bool streaming) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  for (int64_t m = begin; m < end; ++m) {
    T* out = y + m * a.c;
    int32_t first, count;
    if (a.member == nullptr) {
      first = a.anchor[m];
      count = first < 0 ? 0 : 1;
    } else {
      count = a.offset[m + 1] - a.offset[m];
      first = count > 0 ? a.member[a.offset[m]] : 0;
    }
    if (count == 0) {
      std::memset(out, 0, size_t(a.c) * sizeof(T));
    } else if (count == 1) {
      copy_row(out, x + int64_t(first) * a.x_stride, a.c, streaming);
    } else {
      mean_row(a, out, x, a.offset[m], a.offset[m + 1]);
    }
  }
  if (streaming) stream_fence();
}

template <class T>
VIDTOK_INLINE void add_row(float* acc, const T* g, float weight, int64_t n) {
  const vec w = set1(weight);
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) store(acc + j, fma(w, load(g + j), load(acc + j)));
  if (j < n) store(acc + j, fma(w, load(g + j, int(n - j)), load(acc + j, int(n - j))), int(n - j));
}

// bf16 and fp16 gradients are summed in an fp32 block of kBackwardChannels before they are rounded once.
constexpr int64_t kBackwardChannels = 16;

template <class T>
void plan_apply_backward_channels(const PlanApplyArgs& a, int64_t begin, int64_t end) {
  const T* g = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.y);
  const bool direct = sizeof(T) == 4;
  float* scratch = nullptr;
  if (!direct) scratch = new float[size_t(a.n * kBackwardChannels) + 1];
  const int64_t step = direct ? end - begin : kBackwardChannels;
  for (int64_t c0 = begin; c0 < end; c0 += step) {
    const int64_t width = end - c0 < step ? end - c0 : step;
    const auto target = [&](int64_t i) {
      return direct ? reinterpret_cast<float*>(dx) + i * a.c + c0 : scratch + i * width;
    };
    for (int64_t i = 0; i < a.n; ++i) std::memset(target(i), 0, size_t(width) * 4);
    for (int64_t m = 0; m < a.m; ++m) {
      const T* row = g + m * a.x_stride + c0;
      if (a.member == nullptr) {
        if (a.anchor[m] >= 0) add_row(target(a.anchor[m]), row, 1.0f, width);
        continue;
      }
      const bool copy = a.offset[m + 1] - a.offset[m] == 1;
      for (int32_t i = a.offset[m]; i < a.offset[m + 1]; ++i)
        add_row(target(a.member[i]), row, copy ? 1.0f : a.weight[i], width);
    }
    if (direct) continue;
    for (int64_t i = 0; i < a.n; ++i)
      for (int64_t j = 0; j < width; ++j) from_float(scratch[i * width + j], dx[i * a.c + c0 + j]);
  }
  delete[] scratch;
}

void plan_apply_rows_any(const PlanApplyArgs& a, int64_t begin, int64_t end, bool streaming) {
  if (a.dtype == DType::f32) return plan_apply_rows<float>(a, begin, end, streaming);
  if (a.dtype == DType::bf16) return plan_apply_rows<bf16>(a, begin, end, streaming);
  return plan_apply_rows<f16>(a, begin, end, streaming);
}

void plan_apply_backward_any(const PlanApplyArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::f32) return plan_apply_backward_channels<float>(a, begin, end);
  if (a.dtype == DType::bf16) return plan_apply_backward_channels<bf16>(a, begin, end);
  return plan_apply_backward_channels<f16>(a, begin, end);
}

constexpr PlanApplyKernels plan_apply_kernels{plan_apply_rows_any, plan_apply_backward_any};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
