#include "vidtok/proportional_attention.h"

#include <atomic>
#include <memory>
#include <new>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace vidtok {
namespace {

// Every task packs its head's keys and values, which so many rows are worth.
constexpr int64_t kLeastRows = 96;

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

}  // namespace

Status proportional_attention(const ProportionalAttentionArgs& a) {
  const int64_t heads = a.batch * a.heads;
  if (heads == 0 || a.rows == 0 || a.dim == 0) return Status::ok;
  const auto& kernel = kernels().proportional_attention;
  const int64_t floats = kernel.workspace(a.dtype, a.keys, a.dim);
  // Heads are cut where they do not keep the threads busy. A row comes out the same whatever the cuts are.
  int64_t parts = 1;
  while (a.threads > 1 && heads * parts < 2 * a.threads && (a.rows + parts) / (parts + 1) >= kLeastRows) ++parts;
  const int64_t bytes = 4 * heads * (a.rows * a.keys + (a.rows + a.keys) * a.dim);
  std::atomic<int64_t> next{0};
  std::atomic<bool> short_of_memory{false};
  const int threads = heads * parts < a.threads ? int(heads * parts) : a.threads;
  parallel(threads_for(threads, bytes), [&](int, int) {
    const std::unique_ptr<float[], Free> workspace(
        static_cast<float*>(::operator new[](size_t(floats) * sizeof(float), std::align_val_t(64), std::nothrow)));
    if (!workspace) {
      short_of_memory = true;
      return;
    }
    for (int64_t i = next.fetch_add(1); i < heads * parts; i = next.fetch_add(1)) {
      const int64_t head = i / parts, part = i % parts;
      kernel.head(a, head / a.heads, head % a.heads, a.rows * part / parts, a.rows * (part + 1) / parts,
                  workspace.get());
    }
  });
  if (short_of_memory && next.load() < heads * parts)
    return fail(Status::memory, "expected %lld bytes of memory for each thread", (long long)(4 * floats));
  return Status::ok;
}

}  // namespace vidtok
