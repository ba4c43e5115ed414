// Launches a kernel on a stream, on a GPU or on the host; a failure comes back as a sentence.
#pragma once

#if !defined(__CUDACC_RTC__)

#include "cuda/tile/types.h"
#include "vidtok/cuda.h"

#if !defined(VIDTOK_HOST)
#include <cuda_runtime_api.h>
#endif

namespace vidtok::cuda {

// Shared memory that one block of an SM may use.
inline int64_t shared_limit(int sm) {
  if (sm >= 120 || sm == 86 || sm == 89) return 99 * 1024;
  return 1024 * (sm >= 90 ? 227 : sm >= 80 ? 163 : sm >= 75 ? 64 : 96);
}

// Registers of a block lie in this many at most, whatever the SM.
constexpr int kMaxThreads = 1024;

Status check_launch(const char* name, int64_t blocks, int threads, int64_t shared, const Launch& on);

template <class... P, class... A>
Status launch_kernel(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared,
                     const Launch& on, A... args) {
  if (blocks == 0) return Status::ok;
  const Status status = check_launch(name, blocks, threads, shared, on);
  if (status != Status::ok) return status;
#if defined(VIDTOK_HOST)
  return host::launch(name, blocks, threads, shared, [&] { kernel(args...); });
#else
  static_assert(sizeof...(P) == sizeof...(A), "a kernel takes exactly these arguments");
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess)
      return fail(Status::launch, "%s asked for %lld bytes of shared memory on sm_%d: %s", name, (long long)shared,
                  on.sm, cudaGetErrorString(error));
  }
  return [&](P... values) {
    void* pointers[] = {&values...};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)),
                         pointers, size_t(shared), static_cast<cudaStream_t>(on.stream));
    if (error == cudaSuccess) return Status::ok;
    cudaGetLastError();  // a failed launch is reported once
    return fail(Status::launch, "launch of %s on sm_%d with %lld blocks of %d threads and %lld bytes failed: %s", name,
                on.sm, (long long)blocks, threads, (long long)shared, cudaGetErrorString(error));
  }(args...);
#endif
}

// Fills memory on the stream.
inline Status clear(void* p, int value, int64_t bytes, const Launch& on) {
  if (bytes == 0) return Status::ok;
#if defined(VIDTOK_HOST)
  (void)on;
  __builtin_memset(p, value, size_t(bytes));
  return Status::ok;
#else
  const cudaError_t error = cudaMemsetAsync(p, value, size_t(bytes), static_cast<cudaStream_t>(on.stream));
  if (error == cudaSuccess) return Status::ok;
  return fail(Status::launch, "clearing %lld bytes on sm_%d failed: %s", (long long)bytes, on.sm,
              cudaGetErrorString(error));
#endif
}

}  // namespace vidtok::cuda

// kernel: a name, in parentheses where it holds commas.
#define VIDTOK_LAUNCH(kernel, blocks, threads, shared, on, ...) \
  ::vidtok::cuda::launch_kernel(#kernel, kernel, blocks, threads, shared, on, __VA_ARGS__)

#endif
