// plan_apply for one instruction set.
#include "cpu/plan_apply.h"
#include "cpu/simd/rows.inl"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

template <class T>
void plan_apply_rows(const PlanApplyArgs& a, int64_t begin, int64_t end, bool streaming) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t bytes = a.c * int64_t(sizeof(T));
  const auto row = [&](int64_t i) { return x + i * a.x_stride; };
  for (int64_t m = begin; m < end; ++m) {
    T* out = y + m * a.c;
    int64_t first, count;
    if (a.member == nullptr) {
      first = a.anchor[m];
      count = first < 0 ? 0 : 1;
      const int64_t after = m + 1 < end ? a.anchor[m + 1] : -1, later = m + 2 < end ? a.anchor[m + 2] : -1;
      if (later >= 0) prefetch_pages(row(later), bytes);
      if (count == 1) {
        copy_bytes(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(row(first)), bytes, streaming,
                   after < 0 ? nullptr : reinterpret_cast<const char*>(row(after)));
        continue;
      }
      if (bytes > 0) std::memset(out, 0, size_t(bytes));
      continue;
    }
    first = a.offset[m];
    count = a.offset[m + 1] - first;
    if (m + 1 < end)
      for (int64_t i = first + count; i < a.offset[m + 2]; ++i) prefetch_pages(row(a.member[i]), bytes);
    if (count == 0) {
      if (bytes > 0) std::memset(out, 0, size_t(bytes));
    } else if (count == 1 && (!a.weigh_single || a.weight[first] == 1.0f)) {
      copy_bytes(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(row(a.member[first])), bytes, streaming,
                 nullptr);
    } else {
      sum_rows(
          out, a.c,
          [&](auto&& visit) VIDTOK_LAMBDA {
            for (int64_t i = first; i < first + count; ++i) visit(row(a.member[i]), a.weight[i]);
          },
          1.0f, streaming);
    }
  }
  if (streaming) stream_fence();
}

void plan_apply_rows_any(const PlanApplyArgs& a, int64_t begin, int64_t end, bool streaming) {
  if (a.dtype == DType::f32) return plan_apply_rows<float>(a, begin, end, streaming);
  if (a.dtype == DType::bf16) return plan_apply_rows<bf16>(a, begin, end, streaming);
  return plan_apply_rows<f16>(a, begin, end, streaming);
}

constexpr PlanApplyKernels plan_apply_kernels{plan_apply_rows_any};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
