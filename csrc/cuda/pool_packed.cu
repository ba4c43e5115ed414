// Adaptive average pooling of packed grids, all in one launch. The accesses of all written tokens are one line, cut
// into equal blocks; each finds its grid by bisection. Sums run in fp32 over a window's rows, then columns.
#include "cuda/tile/line.h"
#include "cuda/tile/vec.h"
#include "cuda/tile/warp.h"

namespace vidtok::cuda {

// One video: its first token before and after pooling, its sides before and after. Tokens are below 2^31, h and w
// below 2^16.
struct PoolGrid {
  int64_t in, out, t, h, w, oh, ow;
};

struct PoolWindow {
  int begin, end;
};

// Inputs of output i, and outputs that hold input i, of a side n pooled to o; sides are below 2^16.
VIDTOK_DEVICE PoolWindow pool_window(int i, int64_t n, int64_t o) {
  const unsigned before = unsigned(i) * unsigned(n);
  return {int(before / unsigned(o)), int((before + unsigned(n) + unsigned(o) - 1u) / unsigned(o))};
}

// The last video whose first token is at or before the row; videos without tokens share it with the next.
template <int64_t PoolGrid::* FIRST>
VIDTOK_DEVICE PoolGrid pool_grid(const PoolGrid* grids, int64_t videos, int64_t row) {
  int64_t low = 0, high = videos;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (grids[middle].*FIRST <= row ? low : high) = middle;
  }
  return grids[low];
}

// Place of token `local` of frames of h rows and w columns.
struct PoolPlace {
  int64_t frame;
  int row, column;
  VIDTOK_DEVICE PoolPlace(int64_t local, int64_t h, int64_t w) {
    const unsigned at = unsigned(local), line = at / unsigned(w), f = line / unsigned(h);
    frame = f;
    row = int(line - f * unsigned(h));
    column = int(at - line * unsigned(w));
  }
};

// y = mean of each window, N elements at a time; a window of one token is copied.
template <class T, int N, int VECTORS>
__global__ void pool_packed_kernel(const T* x, T* y, const PoolGrid* grids, int64_t videos, int64_t num_out,
                                   int per_row, int64_t x_stride) {
  const int64_t start = block() * threads();
  if (start + thread() >= num_out * per_row) return;
  const LineAt at(LineStart(start, per_row), thread());
  const PoolGrid g = pool_grid<&PoolGrid::out>(grids, videos, at.row);
  const PoolPlace place(at.row - g.out, g.oh, g.ow);
  const PoolWindow rows = pool_window(place.row, g.h, g.oh), columns = pool_window(place.column, g.w, g.ow);
  const int wide = columns.end - columns.begin, count = wide * (rows.end - rows.begin);
  const T* from = x + (g.in + (place.frame * g.h + rows.begin) * g.w + columns.begin) * x_stride + at.column * N;
  T* const to = y + (start + thread()) * N;
  if (count == 1) {
    store(to, load<T, N>(from));
    return;
  }
  const int64_t next_line = (g.w - wide + 1) * x_stride;
  float sum[N] = {};
  int across = 0;
  for (int i = 0; i < count; i += VECTORS) {
    Vec<T, N> held[VECTORS];
    VIDTOK_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      held[v] = Vec<T, N>{};
      if (i + v >= count) continue;
      held[v] = load<T, N>(from);
      const bool last = ++across == wide;
      from += last ? next_line : x_stride;
      across = last ? 0 : across;
    }
    VIDTOK_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      if (i + v >= count) continue;
      VIDTOK_UNROLL
      for (int k = 0; k < N; ++k) sum[k] += to_float(held[v].v[k]);
    }
  }
  Vec<T, N> out;
  VIDTOK_UNROLL
  for (int k = 0; k < N; ++k) out.v[k] = from_float<T>(sum[k] / float(count));
  store(to, out);
}

// Every token takes 1/area of the gradient of each window that holds it: at most two of a side.
template <class T, int N>
__global__ void __launch_bounds__(1024)
    pool_packed_backward_kernel(const T* x, T* y, const PoolGrid* grids, int64_t videos, int64_t num_in, int per_row,
                                int64_t x_stride) {
  const int64_t start = block() * threads();
  if (start + thread() >= num_in * per_row) return;
  const LineAt at(LineStart(start, per_row), thread());
  const PoolGrid g = pool_grid<&PoolGrid::in>(grids, videos, at.row);
  const PoolPlace place(at.row - g.in, g.h, g.w);
  const PoolWindow rows = pool_window(place.row, g.oh, g.h), columns = pool_window(place.column, g.ow, g.w);
  const T* const frame = x + (g.out + place.frame * g.oh * g.ow) * x_stride + at.column * N;
  float sum[N] = {};
  for (int i = rows.begin; i < rows.end; ++i) {
    const PoolWindow down = pool_window(i, g.h, g.oh);
    for (int j = columns.begin; j < columns.end; ++j) {
      const PoolWindow across = pool_window(j, g.w, g.ow);
      const Vec<T, N> held = load<T, N>(frame + (i * g.ow + j) * x_stride);
      const float share = 1.0f / float((down.end - down.begin) * (across.end - across.begin));
      VIDTOK_UNROLL
      for (int k = 0; k < N; ++k) sum[k] = fused(share, to_float(held.v[k]), sum[k]);
    }
  }
  Vec<T, N> out;
  VIDTOK_UNROLL
  for (int k = 0; k < N; ++k) out.v[k] = from_float<T>(sum[k]);
  store(y + (start + thread()) * N, out);
}

}  // namespace vidtok::cuda

#if !defined(__CUDACC_RTC__)

#include "cuda/pool_packed.h"
#include "cuda/tile/launch.h"

namespace vidtok::cuda {
namespace {

bool aligned(const PoolPackedArgs& a) {
  const int64_t size = size_of(a.dtype);
  return reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && reinterpret_cast<uintptr_t>(a.y) % 16 == 0 &&
         a.c * size % 16 == 0 && a.x_stride * size % 16 == 0;
}

template <class T, int N, int VECTORS>
Status pool(const PoolPackedArgs& a, int threads, const Launch& on) {
  const int64_t per_row = a.c / N;
  return VIDTOK_LAUNCH((pool_packed_kernel<T, N, VECTORS>), (a.num_out * per_row + threads - 1) / threads, threads, 0,
                       on, static_cast<const T*>(a.x), static_cast<T*>(a.y), reinterpret_cast<const PoolGrid*>(a.grids),
                       a.videos, a.num_out, int(per_row), a.x_stride);
}

template <class T>
Status pool_of(const PoolPackedArgs& a, const PoolPackedChoice& choice, const Launch& on) {
  if (!aligned(a)) return pool<T, 1, 4>(a, choice.threads, on);
  if (choice.vectors >= 4) return pool<T, kPerAccess<T>, 4>(a, choice.threads, on);
  return choice.vectors == 2 ? pool<T, kPerAccess<T>, 2>(a, choice.threads, on)
                             : pool<T, kPerAccess<T>, 1>(a, choice.threads, on);
}

template <class T, int N>
Status spread(const PoolPackedArgs& a, int threads, const Launch& on) {
  const int64_t per_row = a.c / N;
  return VIDTOK_LAUNCH((pool_packed_backward_kernel<T, N>), (a.num_in * per_row + threads - 1) / threads, threads, 0,
                       on, static_cast<const T*>(a.x), static_cast<T*>(a.y), reinterpret_cast<const PoolGrid*>(a.grids),
                       a.videos, a.num_in, int(per_row), a.x_stride);
}

template <class T>
Status spread_of(const PoolPackedArgs& a, const PoolPackedChoice& choice, const Launch& on) {
  return aligned(a) ? spread<T, kPerAccess<T>>(a, choice.threads, on) : spread<T, 1>(a, choice.threads, on);
}

Status unsupported(const PoolPackedArgs& a) {
  return fail(Status::value, "expected fp32, bf16 or fp16, got dtype %d", int(a.dtype));
}

}  // namespace

Status pool_packed(const PoolPackedArgs& a, const PoolPackedChoice& choice, const Launch& on) {
  if (a.num_out == 0 || a.c == 0) return Status::ok;
  switch (a.dtype) {
    case DType::f32:
      return pool_of<float>(a, choice, on);
    case DType::bf16:
      return pool_of<bf16>(a, choice, on);
    case DType::f16:
      return pool_of<f16>(a, choice, on);
  }
  return unsupported(a);
}

Status pool_packed_backward(const PoolPackedArgs& a, const PoolPackedChoice& choice, const Launch& on) {
  if (a.num_in == 0 || a.c == 0) return Status::ok;
  switch (a.dtype) {
    case DType::f32:
      return spread_of<float>(a, choice, on);
    case DType::bf16:
      return spread_of<bf16>(a, choice, on);
    case DType::f16:
      return spread_of<f16>(a, choice, on);
  }
  return unsupported(a);
}

}  // namespace vidtok::cuda

#endif
