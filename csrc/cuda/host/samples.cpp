#include "cuda/host/samples.h"

#include <cstring>

#include "cuda/tile/async.h"
#include "cuda/tile/block.h"
#include "cuda/tile/launch.h"
#include "cuda/tile/vec.h"

namespace vidtok::cuda {
namespace {

// ---------------------------------------------------------------- legal
__global__ void reverse_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  float* const held = shared.take<float>(n);
  held[thread()] = x[thread()];
  block_sync();
  out[thread()] = held[n - 1 - thread()];
}

// Only the first warp exchanges before the barrier.
__global__ void one_warp_shuffles_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  float* const held = shared.take<float>(n);
  float mine = x[thread()];
  if (warp() == 0) mine = shuffle_xor(shuffle_xor(mine, 5), 5);
  held[thread()] = mine;
  block_sync();
  out[thread()] = held[n - 1 - thread()];
}

// Half of each warp exchanges, and its mask says so.
__global__ void half_mask_kernel(const float* x, float* out, int n) {
  float mine = x[n - 1 - thread()];
  if (lane() < 16) mine = shuffle_xor(shuffle_xor(mine, 3, 0xffffu), 3, 0xffffu);
  out[thread()] = mine;
}

__global__ void async_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  float* const held = shared.take<float>(n);
  if (thread() < n / 4) copy_async(held + 4 * thread(), x + 4 * thread(), true);
  copy_commit();
  copy_wait<0>();
  block_sync();
  out[thread()] = held[n - 1 - thread()];
}

__global__ void scan_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  int32_t* const scratch = shared.take<int32_t>(kWarp);
  int32_t total = 0;
  const int32_t before = block_scan(1, scratch, &total);
  out[before] = total == n ? x[n - 1 - thread()] : -1.0f;
}

// ---------------------------------------------------------------- broken
__global__ void missing_barrier_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  float* const held = shared.take<float>(n);
  held[thread()] = x[thread()];
  out[thread()] = held[n - 1 - thread()];
}

__global__ void missing_wait_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  float* const held = shared.take<float>(n);
  if (thread() < n / 4) copy_async(held + 4 * thread(), x + 4 * thread(), true);
  copy_commit();
  block_sync();
  out[thread()] = held[n - 1 - thread()];
}

__global__ void early_wait_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  float* const held = shared.take<float>(n);
  if (thread() < n / 4) copy_async(held + 4 * thread(), x + 4 * thread(), true);
  copy_commit();
  copy_wait<1>();  // leaves the one group there is under way
  block_sync();
  out[thread()] = held[n - 1 - thread()];
}

__global__ void off_by_one_kernel(const float* x, float* out, int n) { out[thread()] = x[n - thread()]; }

__global__ void shared_off_by_one_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  float* const held = shared.take<float>(n);
  held[thread()] = x[thread()];
  block_sync();
  out[thread()] = held[n - thread()];
}

__global__ void shared_too_small_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  float* const held = shared.take<float>(n + 4);
  held[thread()] = x[thread()];
  block_sync();
  out[thread()] = held[n - 1 - thread()];
}

__global__ void unwritten_kernel(const float* x, float* out, int n) {
  if (thread() > 0) out[thread()] = x[n - 1 - thread()];
}

__global__ void divergent_shuffle_kernel(const float* x, float* out, int n) {
  float mine = x[n - 1 - thread()];
  if (lane() < 16) mine = shuffle_xor(shuffle_xor(mine, 3), 3);
  out[thread()] = mine;
}

// The other half waits at the barrier, so that nobody exits and nobody goes on.
__global__ void shuffle_against_barrier_kernel(const float* x, float* out, int n) {
  float mine = x[n - 1 - thread()];
  if (lane() < 16) mine = shuffle_xor(mine, 3);
  block_sync();
  out[thread()] = mine;
}

__global__ void outside_mask_kernel(const float* x, float* out, int n) {
  out[thread()] = shuffle(x[n - 1 - thread()], lane(), 0xffffu);
}

__global__ void reads_outside_mask_kernel(const float* x, float* out, int n) {
  float mine = x[n - 1 - thread()];
  if (lane() < 16) mine = shuffle(mine, lane() + 16, 0xffffu);
  out[thread()] = mine;
}

__global__ void two_shuffles_kernel(const float* x, float* out, int n) {
  float mine = x[n - 1 - thread()];
  if (lane() < 16)
    mine = shuffle_xor(mine, 1);
  else
    mine = shuffle_xor(mine, 1);
  out[thread()] = mine;
}

__global__ void two_barriers_kernel(const float* x, float* out, int n) {
  if (warp() == 0)
    block_sync();
  else
    block_sync();
  out[thread()] = x[n - 1 - thread()];
}

__global__ void early_exit_kernel(const float* x, float* out, int n) {
  if (warp() == 1) return;
  block_sync();
  out[thread()] = x[n - 1 - thread()];
}

// All threads write one place; the last one wins, whichever that is.
__global__ void race_kernel(const float* x, float* out, int n) {
  VIDTOK_SMEM(shared);
  float* const held = shared.take<float>(1);
  held[0] = x[thread()];
  block_sync();
  out[thread()] = held[0] + 0.0f * float(n);
}

__global__ void switch_kernel(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) warp_sync();
}

struct Sample {
  const char* name;
  void (*kernel)(const float*, float*, int);
};

constexpr Sample kSamples[] = {
    {"reverse", reverse_kernel},
    {"one_warp_shuffles", one_warp_shuffles_kernel},
    {"half_mask", half_mask_kernel},
    {"async", async_kernel},
    {"scan", scan_kernel},
    {"missing_barrier", missing_barrier_kernel},
    {"missing_wait", missing_wait_kernel},
    {"early_wait", early_wait_kernel},
    {"off_by_one", off_by_one_kernel},
    {"shared_off_by_one", shared_off_by_one_kernel},
    {"shared_too_small", shared_too_small_kernel},
    {"unwritten", unwritten_kernel},
    {"divergent_shuffle", divergent_shuffle_kernel},
    {"shuffle_against_barrier", shuffle_against_barrier_kernel},
    {"outside_mask", outside_mask_kernel},
    {"reads_outside_mask", reads_outside_mask_kernel},
    {"two_shuffles", two_shuffles_kernel},
    {"two_barriers", two_barriers_kernel},
    {"early_exit", early_exit_kernel},
    {"race", race_kernel},
};

}  // namespace
}  // namespace vidtok::cuda

namespace vidtok::host {

Status run_sample(const char* sample, const float* x, float* out, int n, const cuda::Launch& on) {
  for (const auto& s : cuda::kSamples)
    if (std::strcmp(s.name, sample) == 0)
      return cuda::launch_kernel(s.name, s.kernel, 1, n, cuda::carved<float>(n), on, x, out, n);
  return fail(Status::value, "expected the name of a sample, got %s", sample);
}

Status switch_fibers(int64_t rounds, const cuda::Launch& on) {
  return VIDTOK_LAUNCH(cuda::switch_kernel, 1, cuda::kWarp, 0, on, rounds);
}

}  // namespace vidtok::host
