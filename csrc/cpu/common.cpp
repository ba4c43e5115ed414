#include "vidtok/common.h"

#include <cstdio>

namespace vidtok {
namespace {
thread_local char message[512] = "";
}

Status fail(Status status, const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::vsnprintf(message, sizeof(message), format, list);
  va_end(list);
  return status;
}

const char* last_message() { return message; }

}  // namespace vidtok
