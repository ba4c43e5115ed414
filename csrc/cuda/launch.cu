#include "cuda/tile/launch.h"

namespace vidtok::cuda {

Status check_launch(const char* name, int64_t blocks, int threads, int64_t shared, const Launch& on) {
  if (blocks < 0 || blocks > 0x7fffffff)
    return fail(Status::value, "expected at most 2147483647 blocks of %s, got %lld", name, (long long)blocks);
  if (threads < 32 || threads > kMaxThreads || threads % 32 != 0)
    return fail(Status::launch, "expected whole warps of at most %d threads for %s, got %d", kMaxThreads, name,
                threads);
  if (shared > shared_limit(on.sm))
    return fail(Status::launch, "%s asks for %lld bytes of shared memory and sm_%d has %lld per block", name,
                (long long)shared, on.sm, (long long)shared_limit(on.sm));
  return Status::ok;
}

}  // namespace vidtok::cuda
