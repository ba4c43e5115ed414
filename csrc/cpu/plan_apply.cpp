#include "vidtok/plan_apply.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {
namespace {

// Above this an output leaves L2 before anybody reads it, and streaming saves its read.
constexpr int64_t kStreamBytes = int64_t(4) << 20;

Status check(const PlanApplyArgs& a) {
  if (a.member == nullptr) {
    for (int64_t i = 0; i < a.m; ++i)
      if (a.anchor[i] < -1 || a.anchor[i] >= a.n)
        return fail(Status::index, "expected anchor in [-1, %lld), got %d at output %lld", (long long)a.n, a.anchor[i],
                    (long long)i);
    return Status::ok;
  }
  int32_t before = 0;
  for (int64_t i = 0; i <= a.m; ++i) {
    if (a.offset[i] < before || (i == 0 && a.offset[i] != 0))
      return fail(Status::index, "expected offset rising from 0, got %d at output %lld", a.offset[i], (long long)i);
    before = a.offset[i];
  }
  if (before != a.nnz)
    return fail(Status::index, "expected offset that ends at %lld members, got %d", (long long)a.nnz, before);
  for (int64_t i = 0; i < a.nnz; ++i)
    if (a.member[i] < 0 || a.member[i] >= a.n)
      return fail(Status::index, "expected member in [0, %lld), got %d at %lld", (long long)a.n, a.member[i],
                  (long long)i);
  return Status::ok;
}

}  // namespace

Status plan_apply(const PlanApplyArgs& args) {
  const Status status = check(args);
  if (status != Status::ok) return status;
  const int64_t row = args.c * size_of(args.dtype);
  const bool streaming = args.m * row >= kStreamBytes;
  const auto run = kernels().plan_apply.rows;
  const int64_t reads = args.member == nullptr ? args.m : args.nnz;
  parallel_ranges(threads_for(args.threads, (args.m + reads) * row), args.m,
                  [&](int64_t begin, int64_t end) { run(args, begin, end, streaming); });
  return Status::ok;
}

Status plan_apply_backward(const PlanApplyArgs& args) {
  const Status status = check(args);
  if (status != Status::ok) return status;
  const auto run = kernels().plan_apply.backward_channels;
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (args.c + kBlock - 1) / kBlock;
  parallel_ranges(threads_for(args.threads, (args.n + args.m) * args.c * 4), blocks, [&](int64_t begin, int64_t end) {
    run(args, begin * kBlock, end * kBlock < args.c ? end * kBlock : args.c);
  });
  return Status::ok;
}

}  // namespace vidtok
