#include "vidtok/pool_packed.h"

#include <memory>
#include <new>

#include "cpu/chunks.h"
#include "cpu/isa.h"

namespace vidtok {
namespace {

// t·h·w, or −1 where it is negative or passes `limit`.
int64_t volume(const int64_t* grid, int64_t limit) {
  int64_t cells = 0;
  if (grid[0] < 0 || grid[1] < 0 || grid[2] < 0) return -1;
  if (__builtin_mul_overflow(grid[0], grid[1], &cells) || __builtin_mul_overflow(cells, grid[2], &cells)) return -1;
  return cells <= limit ? cells : -1;
}

Status layout(const PoolPackedArgs& a, PoolGrid* grids) {
  int64_t in = 0, out = 0;
  for (int64_t v = 0; v < a.videos; ++v) {
    const int64_t *g = a.grid_in + 3 * v, *o = a.grid_out + 3 * v;
    const int64_t held = volume(g, a.num_in - in), left = volume(o, a.num_out - out);
    if (held < 0 || left < 0 || g[0] != o[0] || o[1] > g[1] || o[2] > g[2])
      return fail(Status::index,
                  "expected grids over %lld tokens that pooling only shrinks, got (%lld, %lld, %lld) to (%lld, %lld, "
                  "%lld) at video %lld",
                  (long long)a.num_in, (long long)g[0], (long long)g[1], (long long)g[2], (long long)o[0],
                  (long long)o[1], (long long)o[2], (long long)v);
    grids[v] = {in, out, g[0], g[1], g[2], o[1], o[2]};
    in += held, out += left;
  }
  if (in != a.num_in || out != a.num_out)
    return fail(Status::index, "expected grids over %lld and %lld tokens, got %lld and %lld", (long long)a.num_in,
                (long long)a.num_out, (long long)in, (long long)out);
  return Status::ok;
}

// Calls the kernel for every (frame, row) of every video; rows_of is 0 where the rows hold nothing, however many.
template <class Rows, class Kernel>
Status each_row(const PoolPackedArgs& a, int64_t written, Rows rows_of, Kernel kernel) {
  const std::unique_ptr<PoolGrid[]> grids(new (std::nothrow) PoolGrid[size_t(a.videos) + 1]);
  const std::unique_ptr<int64_t[]> before(new (std::nothrow) int64_t[size_t(a.videos) + 1]);
  if (!grids || !before) return fail(Status::memory, "expected memory for %lld grids", (long long)a.videos);
  const Status status = layout(a, grids.get());
  if (status != Status::ok) return status;
  before[0] = 0;
  for (int64_t v = 0; v < a.videos; ++v) before[v + 1] = before[v] + grids[v].t * rows_of(grids[v]);
  const int64_t rows = before[a.videos];
  if (rows == 0) return Status::ok;
  const int64_t row = a.c * size_of(a.dtype), bytes = (a.num_in + a.num_out) * row;
  const bool streaming = written * row >= kStreamBytes;
  parallel_chunks(threads_for(a.threads, bytes), rows, bytes / rows, [&](int64_t begin, int64_t end) {
    int64_t low = 0, high = a.videos;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (before[middle] <= begin ? low : high) = middle;
    }
    for (int64_t v = low; begin < end; ++begin) {
      while (before[v + 1] <= begin) ++v;
      const int64_t local = begin - before[v], side = rows_of(grids[v]);
      kernel(a, grids[v], local / side, local % side, streaming);
    }
  });
  return Status::ok;
}

}  // namespace

Status pool_packed(const PoolPackedArgs& args) {
  return each_row(args, args.num_out, [](const PoolGrid& g) { return g.ow > 0 ? g.oh : 0; }, kernels().pool_packed.row);
}

Status pool_packed_backward(const PoolPackedArgs& args) {
  return each_row(
      args, args.num_in, [](const PoolGrid& g) { return g.w > 0 ? g.h : 0; }, kernels().pool_packed.backward_row);
}

}  // namespace vidtok
