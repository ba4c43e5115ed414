#include "vidtok/plan_apply.h"

#include <memory>
#include <new>

#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {
namespace {

Status check_range(const int32_t* index, int64_t count, int64_t n, int32_t lowest, const char* name) {
  int32_t low = lowest, high = -1;
  for (int64_t i = 0; i < count; ++i) {
    low = index[i] < low ? index[i] : low;
    high = index[i] > high ? index[i] : high;
  }
  if (low >= lowest && high < n) return Status::ok;
  return fail(Status::index, "expected %s in [%d, %lld), got %d", name, lowest, (long long)n,
              low < lowest ? low : high);
}

Status check(const PlanApplyArgs& a) {
  if (a.member == nullptr) return check_range(a.anchor, a.m, a.n, -1, "anchor");
  int32_t before = 0;
  for (int64_t i = 0; i <= a.m; ++i) {
    if (a.offset[i] < before || (i == 0 && a.offset[i] != 0))
      return fail(Status::index, "expected offset rising from 0, got %d at output %lld", a.offset[i], (long long)i);
    before = a.offset[i];
  }
  if (before != a.nnz)
    return fail(Status::index, "expected offset that ends at %lld members, got %d", (long long)a.nnz, before);
  return check_range(a.member, a.nnz, a.n, 0, "member");
}

// Outputs handed out in chunks of equal bytes; every output has one owner.
void run(const PlanApplyArgs& args) {
  const int64_t row = args.c * size_of(args.dtype);
  const bool streaming = args.m * row >= kStreamBytes;
  const int64_t rows = args.m + (args.member == nullptr ? args.m : args.nnz);
  const auto kernel = kernels().plan_apply.rows;
  const int threads = threads_for(args.threads, rows * row);
  if (args.member == nullptr)
    return parallel_chunks(threads, args.m, 2 * row,
                           [&](int64_t begin, int64_t end) { kernel(args, begin, end, streaming); });
  // Member i and the output it opens lie at i + (outputs before it) on the line that is cut.
  const auto first_output = [&](int64_t at) {
    int64_t low = 0, high = args.m;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (args.offset[middle] + middle < at)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  parallel_chunks(threads, rows, row, [&](int64_t begin, int64_t end) {
    const int64_t from = first_output(begin), to = end == rows ? args.m : first_output(end);
    if (from < to) kernel(args, from, to, streaming);
  });
}

}  // namespace

Status plan_apply(const PlanApplyArgs& args) {
  const Status status = check(args);
  if (status == Status::ok) run(args);
  return status;
}

// The transposed lists, owners in order, make the backward another weighted sum of rows.
Status plan_apply_backward(const PlanApplyArgs& args) {
  const Status status = check(args);
  if (status != Status::ok) return status;
  const bool gather = args.member == nullptr;
  int64_t nnz = args.nnz;
  if (gather) {
    nnz = 0;
    for (int64_t i = 0; i < args.m; ++i) nnz += args.anchor[i] >= 0;
  }
  const std::unique_ptr<int32_t[]> offset(new (std::nothrow) int32_t[size_t(args.n) + 2]());
  const std::unique_ptr<int32_t[]> owner(new (std::nothrow) int32_t[size_t(nnz) + 1]);
  const std::unique_ptr<float[]> weight(new (std::nothrow) float[size_t(nnz) + 1]);
  if (!offset || !owner || !weight)
    return fail(Status::memory, "expected memory for %lld transposed members", (long long)nnz);
  // offset[i + 1] counts where input i's owners begin, then ends up at where they end.
  int32_t* cursor = offset.get() + 1;
  const auto each = [&](auto&& visit) {
    for (int64_t m = 0; m < args.m; ++m) {
      if (gather) {
        if (args.anchor[m] >= 0) visit(args.anchor[m], m, 1.0f);
        continue;
      }
      const bool single = args.offset[m + 1] - args.offset[m] == 1;
      for (int32_t i = args.offset[m]; i < args.offset[m + 1]; ++i)
        visit(args.member[i], m, single ? 1.0f : args.weight[i]);
    }
  };
  each([&](int32_t input, int64_t, float) { ++cursor[input]; });
  int32_t total = 0;
  for (int64_t i = 0; i < args.n; ++i) {
    const int32_t count = cursor[i];
    cursor[i] = total;
    total += count;
  }
  each([&](int32_t input, int64_t m, float w) {
    owner[cursor[input]] = int32_t(m);
    weight[cursor[input]++] = w;
  });
  run({args.x, args.y, args.dtype, args.m, args.n, args.c, args.x_stride, nullptr, owner.get(), offset.get(),
       weight.get(), nnz, args.threads, true});
  return Status::ok;
}

}  // namespace vidtok
