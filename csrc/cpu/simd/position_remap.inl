// position_remap for one instruction set.
#include "cpu/position_remap.h"
#include "cpu/simd/rows.inl"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

template <class T>
void remap_scalars(const RemapTensor& t, const int32_t* anchor, int64_t n, int64_t m, int64_t outer, int64_t begin,
                   int64_t end) {
  const T* x = static_cast<const T*>(t.x) + outer * n;
  T* y = static_cast<T*>(t.y) + outer * m;
  for (int64_t i = begin; i < end; ++i) y[i] = anchor[i] < 0 ? T(t.fill) : x[anchor[i]];
}

VIDTOK_INLINE void fill_bytes(char* y, const RemapTensor& t) {
  if (t.fill == 0) {
    if (t.inner > 0) std::memset(y, 0, size_t(t.inner));
    return;
  }
  for (int64_t i = 0; i < t.inner; i += t.element) std::memcpy(y + i, &t.fill, size_t(t.element));
}

void remap_entries(const RemapTensor& t, const int32_t* anchor, int64_t n, int64_t m, int64_t outer, int64_t begin,
                   int64_t end, bool streaming) {
  if (t.inner == t.element) {
    if (t.inner == 8) return remap_scalars<uint64_t>(t, anchor, n, m, outer, begin, end);
    if (t.inner == 4) return remap_scalars<uint32_t>(t, anchor, n, m, outer, begin, end);
    if (t.inner == 2) return remap_scalars<uint16_t>(t, anchor, n, m, outer, begin, end);
    return remap_scalars<uint8_t>(t, anchor, n, m, outer, begin, end);
  }
  const char* x = static_cast<const char*>(t.x) + outer * n * t.inner;
  char* y = static_cast<char*>(t.y) + outer * m * t.inner;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t after = i + 1 < end ? anchor[i + 1] : -1, later = i + 2 < end ? anchor[i + 2] : -1;
    if (later >= 0) prefetch_pages(x + later * t.inner, t.inner);
    if (anchor[i] < 0)
      fill_bytes(y + i * t.inner, t);
    else
      copy_bytes(y + i * t.inner, x + anchor[i] * t.inner, t.inner, streaming,
                 after < 0 ? nullptr : x + after * t.inner);
  }
  if (streaming) stream_fence();
}

constexpr PositionRemapKernels position_remap_kernels{remap_entries};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
