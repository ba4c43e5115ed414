#include "vidtok/position_remap.h"

#include "cpu/chunks.h"
#include "cpu/isa.h"

namespace vidtok {

Status position_remap(const PositionRemapArgs& args) {
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < args.m; ++i) {
    low = args.anchor[i] < low ? args.anchor[i] : low;
    high = args.anchor[i] > high ? args.anchor[i] : high;
  }
  if (low < -1 || high >= args.n)
    return fail(Status::index, "expected anchor in [-1, %lld), got %d", (long long)args.n, low < -1 ? low : high);
  const auto step_of = [&](const RemapTensor& t) {
    const int64_t bytes = 2 * t.inner;
    return bytes >= kChunkBytes ? int64_t(1) : kChunkBytes / (bytes > 0 ? bytes : 1);
  };
  const auto tasks_of = [&](const RemapTensor& t) {
    const int64_t step = step_of(t);
    return t.outer * ((args.m + step - 1) / step);
  };
  int64_t tasks = 0, bytes = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    tasks += tasks_of(args.tensors[i]);
    bytes += 2 * args.m * args.tensors[i].outer * args.tensors[i].inner;
  }
  const auto kernel = kernels().position_remap.entries;
  parallel_tasks(threads_for(args.threads, bytes), tasks, [&](int64_t task) {
    const RemapTensor* t = args.tensors;
    for (int64_t here = tasks_of(*t); task >= here; here = tasks_of(*t)) task -= here, ++t;
    const int64_t step = step_of(*t), chunks = (args.m + step - 1) / step;
    const int64_t begin = task % chunks * step, end = begin + step;
    const bool streaming = args.m * t->outer * t->inner >= kStreamBytes;
    kernel(*t, args.anchor, args.n, args.m, task / chunks, begin, end < args.m ? end : args.m, streaming);
  });
  return Status::ok;
}

}  // namespace vidtok
