// Types shared by every operator: plain data, no torch, no Python.
#pragma once

#include <cstdarg>
#include <cstdint>

namespace vidtok {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

enum class Status : int {
  ok = 0,
  index = 1,   // an index from outside points beyond its data
  memory = 2,  // the workspace could not be allocated
  value = 3,   // a number outside its range
  launch = 4,  // a kernel did not start, or the host run found it faulty
};

// Keeps a sentence for the calling thread and returns the status, so that a kernel may
// `return fail(Status::index, "expected …, got %ld", value)`.
Status fail(Status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The sentence of the calling thread's last failure.
const char* last_message();

}  // namespace vidtok
