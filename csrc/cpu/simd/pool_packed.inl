// pool_packed for one instruction set.
#include "cpu/pool_packed.h"
#include "cpu/simd/rows.inl"

namespace vidtok {
namespace VIDTOK_ISA {
namespace {

struct Window {
  int64_t begin, end;
};

// Inputs of output i, and outputs that hold input i, of a side n pooled to o.
VIDTOK_INLINE Window window_of(int64_t i, int64_t n, int64_t o) { return {i * n / o, ((i + 1) * n + o - 1) / o}; }

template <class T>
void pool_row(const PoolPackedArgs& a, const PoolGrid& g, int64_t f, int64_t i, bool streaming) {
  const T* x = static_cast<const T*>(a.x) + (g.in + f * g.h * g.w) * a.x_stride;
  T* y = static_cast<T*>(a.y) + (g.out + (f * g.oh + i) * g.ow) * a.c;
  const int64_t bytes = a.c * int64_t(sizeof(T));
  const bool same = g.oh == g.h && g.ow == g.w;
  const Window rows = window_of(i, g.h, g.oh);
  for (int64_t j = 0; j < g.ow; ++j, y += a.c) {
    if (same) {
      const T* from = x + (i * g.w + j) * a.x_stride;
      copy_bytes(reinterpret_cast<char*>(y), reinterpret_cast<const char*>(from), bytes, streaming,
                 j + 1 < g.ow ? reinterpret_cast<const char*>(from + a.x_stride) : nullptr);
      continue;
    }
    const Window columns = window_of(j, g.w, g.ow);
    const int64_t wide = columns.end - columns.begin, count = wide * (rows.end - rows.begin);
    const T* corner = x + (rows.begin * g.w + columns.begin) * a.x_stride;
    sum_rows(
        y, a.c,
        [&](auto&& visit) VIDTOK_LAMBDA {
          const T* line = corner;
          for (int64_t r = rows.begin; r < rows.end; ++r, line += g.w * a.x_stride)
            for (int64_t s = 0; s < wide; ++s) visit(line + s * a.x_stride, 1.0f);
        },
        float(count), streaming);
  }
  if (streaming) stream_fence();
}

// Every token takes 1/area of the gradient of each window that holds it.
template <class T>
void pool_backward_row(const PoolPackedArgs& a, const PoolGrid& g, int64_t f, int64_t r, bool streaming) {
  const T* x = static_cast<const T*>(a.x) + (g.out + f * g.oh * g.ow) * a.x_stride;
  T* y = static_cast<T*>(a.y) + (g.in + (f * g.h + r) * g.w) * a.c;
  const Window rows = window_of(r, g.oh, g.h);
  for (int64_t s = 0; s < g.w; ++s, y += a.c) {
    const Window columns = window_of(s, g.ow, g.w);
    const T* corner = x + (rows.begin * g.ow + columns.begin) * a.x_stride;
    const int64_t high = rows.end - rows.begin, wide = columns.end - columns.begin;
    float share[2][2];  // a side that shrinks puts a token into at most two windows
    for (int64_t i = 0; i < high; ++i)
      for (int64_t j = 0; j < wide; ++j) {
        const Window down = window_of(rows.begin + i, g.h, g.oh), across = window_of(columns.begin + j, g.w, g.ow);
        share[i][j] = 1.0f / float((down.end - down.begin) * (across.end - across.begin));
      }
    sum_rows(
        y, a.c,
        [&](auto&& visit) VIDTOK_LAMBDA {
          const T* line = corner;
          for (int64_t i = 0; i < high; ++i, line += g.ow * a.x_stride)
            for (int64_t j = 0; j < wide; ++j) visit(line + j * a.x_stride, share[i][j]);
        },
        1.0f, streaming);
  }
  if (streaming) stream_fence();
}

void pool_row_any(const PoolPackedArgs& a, const PoolGrid& g, int64_t f, int64_t i, bool streaming) {
  if (a.dtype == DType::f32) return pool_row<float>(a, g, f, i, streaming);
  if (a.dtype == DType::bf16) return pool_row<bf16>(a, g, f, i, streaming);
  return pool_row<f16>(a, g, f, i, streaming);
}

void pool_backward_row_any(const PoolPackedArgs& a, const PoolGrid& g, int64_t f, int64_t r, bool streaming) {
  if (a.dtype == DType::f32) return pool_backward_row<float>(a, g, f, r, streaming);
  if (a.dtype == DType::bf16) return pool_backward_row<bf16>(a, g, f, r, streaming);
  return pool_backward_row<f16>(a, g, f, r, streaming);
}

constexpr PoolPackedKernels pool_packed_kernels{pool_row_any, pool_backward_row_any};

}  // namespace
}  // namespace VIDTOK_ISA
}  // namespace vidtok
