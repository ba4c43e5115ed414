// Plays a GPU for kernels compiled for the host: blocks run one after another, threads are fibers that switch
// at barriers and exchanges only. Faults that a GPU would answer with a hang or a wrong number are errors here:
// a barrier that not all threads reach, or reach at different places; a lane that its warp waits for in vain; a
// read of shared memory that nobody wrote (it is poisoned); a copy that was not waited for. The order in which
// threads and blocks run can be changed, to show code that depends on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "vidtok/common.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

// The place of a call, as default arguments of a twin.
#define VIDTOK_SITE const char *site_file = __builtin_FILE(), int site_line = __builtin_LINE()

namespace vidtok::host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct Position {
  Index thread, block, block_dim, grid_dim;
};
extern Position position;

constexpr int kSlotBytes = 128;

// Orders in which threads and blocks run: forward, backward, and shuffles.
void set_order(int order);

// Kernels launched so far.
int64_t launches();

Status launch_fibers(const char* name, int64_t blocks, int threads, int64_t shared, void (*body)(const void*),
                     const void* closure);

template <class F>
Status launch(const char* name, int64_t blocks, int threads, int64_t shared, const F& body) {
  return launch_fibers(name, blocks, threads, shared, [](const void* f) { (*static_cast<const F*>(f))(); }, &body);
}

// Stops the launch; it returns this sentence.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

void block_barrier(const char* file, int line);
void warp_barrier(unsigned mask, const char* file, int line);

// Publishes `bytes` of every lane of the mask and returns the 32 slots, kSlotBytes apart; valid until the lane's
// next exchange.
const unsigned char* exchange(const void* mine, size_t bytes, unsigned mask, const char* file, int line);

template <class T>
T shuffle(T x, int from, unsigned mask, const char* file, int line) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "a GPU shuffles 4 or 8 bytes");
  const unsigned char* slots = exchange(&x, sizeof x, mask, file, line);
  if (!((mask >> from) & 1u))
    fault("shuffle at %s:%d reads lane %d, which mask %08x leaves out", file, line, from, mask);
  T out;
  __builtin_memcpy(&out, slots + size_t(from) * kSlotBytes, sizeof out);
  return out;
}

unsigned ballot(bool x, unsigned mask, const char* file, int line);

void copy_async(void* to, const void* from, int bytes);
void copy_commit();
void copy_wait(int pending);

// A piece of the block's shared memory; pieces lie apart, with red zones between them under AddressSanitizer.
void* carve(int64_t* used, int64_t* pieces, int64_t carved, int64_t bytes);

}  // namespace vidtok::host

#define threadIdx (::vidtok::host::position.thread)
#define blockIdx (::vidtok::host::position.block)
#define blockDim (::vidtok::host::position.block_dim)
#define gridDim (::vidtok::host::position.grid_dim)
