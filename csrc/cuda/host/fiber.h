// A switch of stacks in a few nanoseconds (swapcontext makes a system call each time).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define VIDTOK_ASAN 1
#else
#define VIDTOK_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace vidtok::host {

#if defined(__x86_64__)

extern "C" void vidtok_switch_stack(void** save, void* to);

asm(R"(
.text
.hidden vidtok_switch_stack
.globl vidtok_switch_stack
.type vidtok_switch_stack, @function
vidtok_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vidtok_switch_stack, .-vidtok_switch_stack
)");

struct Context {
  void* sp = nullptr;
  void start(char* stack, size_t bytes, void (*entry)()) {
    // The entry finds the stack as a call would leave it: 16-byte aligned before the return address.
    auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
    auto* frame = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    sp = frame;
  }
  void switch_to(Context& other) { vidtok_switch_stack(&sp, other.sp); }
};

#else

struct Context {
  ucontext_t at;
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&at);
    at.uc_stack.ss_sp = stack;
    at.uc_stack.ss_size = bytes;
    at.uc_link = nullptr;
    makecontext(&at, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&at, &other.at); }
};

#endif

// A context that AddressSanitizer knows about.
struct Fiber {
  Context context;
  char* stack = nullptr;  // null: the stack of the thread that launches
  size_t bytes = 0;
#if VIDTOK_ASAN
  void* fake = nullptr;
#endif

  void start(void (*entry)()) {
#if VIDTOK_ASAN
    __asan_unpoison_memory_region(stack, bytes);
    fake = nullptr;
#endif
    context.start(stack, bytes, entry);
  }
  void switch_to(Fiber& other) {
#if VIDTOK_ASAN
    __sanitizer_start_switch_fiber(&fake, other.stack, other.bytes);
#endif
    context.switch_to(other.context);
    arrived();
  }
  // The first thing a fiber does after a switch to it.
  void arrived() {
#if VIDTOK_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
};

}  // namespace vidtok::host
