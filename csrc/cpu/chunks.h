// How operators that move bytes cut their work.
#pragma once

#include "cpu/parallel.h"

namespace vidtok {

// Above this an output leaves L2 before anybody reads it, and streaming saves its read.
constexpr int64_t kStreamBytes = int64_t(1) << 20;

// Runs body(begin, end) over chunks of [0, count) of some kChunkBytes, handed out as threads come free.
// Only for work whose result does not depend on the cuts.
constexpr int64_t kChunkBytes = 128 * 1024;

template <class Body>
void parallel_chunks(int threads, int64_t count, int64_t bytes_each, Body&& body) {
  if (count <= 0) return;
  if (threads <= 1) return body(int64_t(0), count);
  const int64_t step = bytes_each >= kChunkBytes ? 1 : kChunkBytes / (bytes_each > 0 ? bytes_each : 1);
  parallel_tasks(threads, (count + step - 1) / step, [&](int64_t task) {
    const int64_t begin = task * step, end = begin + step;
    body(begin, end < count ? end : count);
  });
}

}  // namespace vidtok
