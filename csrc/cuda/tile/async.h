// Copies from global to shared memory that overlap with arithmetic (sm_80 and up; plain copies before).
// A copied piece may be read after copy_wait and a barrier. The host twin copies at the wait, not at the
// issue, so that a missing wait shows.
#pragma once

#include "cuda/tile/types.h"

namespace vidtok::cuda {

// 16 bytes, zeros where !valid (then `from` is not read).
VIDTOK_DEVICE void copy_async(void* to, const void* from, bool valid) {
#if defined(VIDTOK_HOST) && VIDTOK_SM >= 80
  host::copy_async(to, from, valid ? 16 : 0);
#elif !defined(VIDTOK_HOST) && VIDTOK_SM >= 80
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
  struct alignas(16) Words {
    uint32_t w[4];
  };
  *static_cast<Words*>(to) = valid ? *static_cast<const Words*>(from) : Words{};
#endif
}

// Closes a group of copies.
VIDTOK_DEVICE void copy_commit() {
#if defined(VIDTOK_HOST) && VIDTOK_SM >= 80
  host::copy_commit();
#elif !defined(VIDTOK_HOST) && VIDTOK_SM >= 80
  asm volatile("cp.async.commit_group;" ::: "memory");
#else  // the copies are done
#endif
}

// Waits until at most PENDING of this thread's newest groups are under way.
template <int PENDING>
VIDTOK_DEVICE void copy_wait() {
#if defined(VIDTOK_HOST) && VIDTOK_SM >= 80
  host::copy_wait(PENDING);
#elif !defined(VIDTOK_HOST) && VIDTOK_SM >= 80
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else  // the copies are done
#endif
}

// Asks for 32 bytes of global memory ahead of their use; they come to the second-level cache.
VIDTOK_DEVICE void prefetch(const void* from) {
#if defined(VIDTOK_HOST)
  (void)*static_cast<const volatile unsigned char*>(from);  // the address must be good
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

}  // namespace vidtok::cuda
