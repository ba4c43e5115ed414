#include "cuda/host/host.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/host/fiber.h"

namespace vidtok::host {

Position position;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = VIDTOK_ASAN ? 256 << 10 : 64 << 10;
constexpr int64_t kGap = 32;
constexpr int kMaxPieces = 64;
// NaN in every float format and -1 in every integer.
constexpr int kPoison = 0xff;

enum class State { ready, block_barrier, warp_barrier, exchange, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  Fiber fiber;
  State state = State::done;
  unsigned mask = 0;
  const char* file = nullptr;
  int line = 0;
  size_t bytes = 0;
  alignas(16) unsigned char slot[kSlotBytes];
  alignas(16) unsigned char inbox[kLanes * kSlotBytes];
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

// Stacks with an inaccessible page below each, kept for the next launch.
class Stacks {
 public:
  ~Stacks() {
    if (base_ != nullptr) munmap(base_, count_ * pitch_);
  }
  bool reserve(size_t count) {
    if (count <= count_) return true;
    if (base_ != nullptr) munmap(base_, count_ * pitch_);
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    pitch_ = kStackBytes + page;
    count_ = 0;
    void* p = mmap(nullptr, count * pitch_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    base_ = p == MAP_FAILED ? nullptr : static_cast<char*>(p);
    if (base_ == nullptr) return false;
    for (size_t i = 0; i < count; ++i) mprotect(base_ + i * pitch_, page, PROT_NONE);
    count_ = count;
    return true;
  }
  char* stack(size_t i) const { return base_ + (i + 1) * pitch_ - kStackBytes; }

 private:
  char* base_ = nullptr;
  size_t count_ = 0, pitch_ = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  Stacks stacks;
  Fiber launcher;
  int current = 0, count = 0, arrived = 0, finished = 0;
  const char* name = "";
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  std::vector<unsigned char> shared;
  int64_t shared_bytes = 0;
  bool failed = false;
  char message[512];
};
Machine m;
int order = 0;
int64_t launched = 0;

Thread& me() { return *m.threads[size_t(m.current)]; }

void to_launcher() { me().fiber.switch_to(m.launcher); }

void entry() {
  me().fiber.arrived();
  m.body(m.closure);
  me().state = State::done;
  ++m.finished;
  to_launcher();
  __builtin_unreachable();
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

// Blocks one thread until the others it waits for are there.
void wait(State state, unsigned mask, const char* file, int line) {
  Thread& t = me();
  t.state = state;
  t.mask = mask;
  t.file = file;
  t.line = line;
  to_launcher();
}

void require_lane(unsigned mask, const char* file, int line) {
  if (!((mask >> (m.current % kLanes)) & 1u))
    fault("lane %d is not in mask %08x of its own call at %s:%d", m.current % kLanes, mask, base_name(file), line);
}

// After thread `id` began to wait: release its warp's exchange or barrier when the whole mask is there.
void settle_warp(int id) {
  const Thread& t = *m.threads[size_t(id)];
  const int first = id / kLanes * kLanes;
  for (int l = 0; l < kLanes; ++l) {
    if (!((t.mask >> l) & 1u)) continue;
    const int other = first + l;
    if (other >= m.count) {
      m.failed = true;
      std::snprintf(m.message, sizeof m.message, "mask %08x at %s:%d names lane %d, which the block does not have",
                    t.mask, base_name(t.file), t.line, l);
      return;
    }
    const Thread& o = *m.threads[size_t(other)];
    if (o.state == State::done) {
      m.failed = true;
      std::snprintf(m.message, sizeof m.message, "mask %08x at %s:%d names lane %d, which has exited", t.mask,
                    base_name(t.file), t.line, l);
      return;
    }
    if (o.state != State::exchange && o.state != State::warp_barrier) return;
    if (o.state != t.state || o.mask != t.mask || o.line != t.line || std::strcmp(o.file, t.file) != 0) {
      if (!((o.mask >> (id % kLanes)) & 1u)) return;  // waits for others; may come here later
      m.failed = true;
      std::snprintf(m.message, sizeof m.message,
                    "lane %d waits at %s:%d with mask %08x and lane %d at %s:%d with mask %08x: the warp diverged",
                    id % kLanes, base_name(t.file), t.line, t.mask, l, base_name(o.file), o.line, o.mask);
      return;
    }
  }
  const unsigned mask = t.mask;
  const size_t bytes = t.bytes;
  const bool data = t.state == State::exchange;
  for (int to = 0; to < kLanes; ++to) {
    if (!((mask >> to) & 1u)) continue;
    Thread& target = *m.threads[size_t(first + to)];
    if (data)
      for (int from = 0; from < kLanes; ++from)
        if ((mask >> from) & 1u)
          std::memcpy(target.inbox + size_t(from) * kSlotBytes, m.threads[size_t(first + from)]->slot, bytes);
    target.state = State::ready;
  }
}

void settle_block(int id) {
  const Thread& t = *m.threads[size_t(id)];
  for (int i = 0; i < m.count; ++i) {
    const Thread& o = *m.threads[size_t(i)];
    if (o.state == State::block_barrier && (o.line != t.line || std::strcmp(o.file, t.file) != 0)) {
      m.failed = true;
      std::snprintf(m.message, sizeof m.message, "thread %d waits at the barrier %s:%d and thread %d at %s:%d", id,
                    base_name(t.file), t.line, i, base_name(o.file), o.line);
      return;
    }
  }
  if (++m.arrived < m.count) return;
  m.arrived = 0;
  for (int i = 0; i < m.count; ++i) m.threads[size_t(i)]->state = State::ready;
}

void describe_deadlock() {
  int at_barrier = 0, in_warp = 0, example = -1;
  for (int i = 0; i < m.count; ++i) {
    const State s = m.threads[size_t(i)]->state;
    at_barrier += s == State::block_barrier;
    in_warp += s == State::exchange || s == State::warp_barrier;
    if (example < 0 && s != State::done && s != State::ready) example = i;
  }
  m.failed = true;
  const Thread& t = *m.threads[size_t(example)];
  std::snprintf(
      m.message, sizeof m.message,
      "deadlock: of %d threads %d exited, %d wait at a barrier and %d for their warp; thread %d waits at %s:%d "
      "(mask %08x)",
      m.count, m.finished, at_barrier, in_warp, example, base_name(t.file), t.line, t.mask);
}

std::vector<int64_t> permutation(int64_t n, uint64_t salt) {
  std::vector<int64_t> out(static_cast<size_t>(n));
  std::iota(out.begin(), out.end(), 0);
  if (order == 1) std::reverse(out.begin(), out.end());
  if (order > 1) {
    std::mt19937_64 random(uint64_t(order) * 1000003u + salt);
    std::shuffle(out.begin(), out.end(), random);
  }
  return out;
}

void expose_shared() {
#if VIDTOK_ASAN
  __asan_unpoison_memory_region(m.shared.data(), m.shared.size());
#endif
}

void poison_shared() {
  expose_shared();
  std::memset(m.shared.data(), kPoison, m.shared.size());
#if VIDTOK_ASAN
  __asan_poison_memory_region(m.shared.data(), m.shared.size());
#endif
}

bool run_block(const std::vector<int64_t>& thread_order) {
  m.arrived = m.finished = 0;
  poison_shared();
  for (int i = 0; i < m.count; ++i) {
    Thread& t = *m.threads[size_t(i)];
    t.fiber.stack = m.stacks.stack(size_t(i));
    t.fiber.bytes = kStackBytes;
    t.fiber.start(&entry);
    t.state = State::ready;
    t.open.clear();
    t.groups.clear();
  }
  while (m.finished < m.count) {
    bool moved = false;
    for (const int64_t i : thread_order) {
      Thread& t = *m.threads[size_t(i)];
      if (t.state != State::ready) continue;
      moved = true;
      m.current = int(i);
      position.thread.x = unsigned(i);
      m.launcher.switch_to(t.fiber);
      if (m.failed) return false;
      if (t.state == State::block_barrier) settle_block(int(i));
      if (t.state == State::exchange || t.state == State::warp_barrier) settle_warp(int(i));
      if (m.failed) return false;
    }
    if (!moved) {
      describe_deadlock();
      return false;
    }
  }
  return true;
}

}  // namespace

void set_order(int wanted) { order = wanted; }

int64_t launches() { return launched; }

void fault(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::vsnprintf(m.message, sizeof m.message, format, list);
  va_end(list);
  m.failed = true;
  to_launcher();
  __builtin_unreachable();
}

Status launch_fibers(const char* name, int64_t blocks, int threads, int64_t shared, void (*body)(const void*),
                     const void* closure) {
  ++launched;
  m.name = name;
  m.body = body;
  m.closure = closure;
  m.count = threads;
  m.failed = false;
  m.shared_bytes = shared;
  expose_shared();
  m.shared.resize(size_t(shared + kGap * (kMaxPieces + 1)));
  if (!m.stacks.reserve(size_t(threads))) return fail(Status::memory, "expected memory for %d stacks", threads);
  while (int(m.threads.size()) < threads) m.threads.push_back(std::make_unique<Thread>());
#if VIDTOK_ASAN
  // The launcher's own stack, which the sanitizer wants to know on the way back.
  pthread_attr_t attributes;
  void* low = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &bytes);
  pthread_attr_destroy(&attributes);
  m.launcher.stack = static_cast<char*>(low);
  m.launcher.bytes = bytes;
#endif
  position = {};
  position.block_dim = {unsigned(threads), 1, 1};
  position.grid_dim = {unsigned(blocks), 1, 1};
  const std::vector<int64_t> thread_order = permutation(threads, 1);
  for (const int64_t b : permutation(blocks, 2)) {
    position.block.x = unsigned(b);
    if (!run_block(thread_order))
      return fail(Status::launch, "%s, block %lld of %lld, thread %d: %s", name, (long long)b, (long long)blocks,
                  m.current, m.message);
  }
  return Status::ok;
}

void block_barrier(const char* file, int line) { wait(State::block_barrier, 0, file, line); }

void warp_barrier(unsigned mask, const char* file, int line) {
  require_lane(mask, file, line);
  wait(State::warp_barrier, mask, file, line);
}

const unsigned char* exchange(const void* mine, size_t bytes, unsigned mask, const char* file, int line) {
  require_lane(mask, file, line);
  if (bytes > size_t(kSlotBytes)) fault("%s:%d exchanges %zu bytes", base_name(file), line, bytes);
  Thread& t = me();
  std::memcpy(t.slot, mine, bytes);
  t.bytes = bytes;
  wait(State::exchange, mask, file, line);
  return t.inbox;
}

unsigned ballot(bool x, unsigned mask, const char* file, int line) {
  const unsigned char mine = x;
  const unsigned char* slots = exchange(&mine, 1, mask, file, line);
  unsigned out = 0;
  for (int l = 0; l < kLanes; ++l)
    if ((mask >> l) & 1u) out |= unsigned(slots[size_t(l) * kSlotBytes] != 0) << l;
  return out;
}

void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    fault("cp.async expects addresses of a multiple of 16");
  me().open.push_back({to, from, bytes});
}

void copy_commit() {
  Thread& t = me();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void copy_wait(int pending) {
  Thread& t = me();
  while (int(t.groups.size()) > pending) {
    for (const Copy& c : t.groups.front()) {
      std::memset(c.to, 0, 16);
      if (c.bytes > 0) std::memcpy(c.to, c.from, size_t(c.bytes));
    }
    t.groups.erase(t.groups.begin());
  }
}

void* carve(int64_t* used, int64_t* pieces, int64_t carved, int64_t bytes) {
  if (*used + carved > m.shared_bytes)
    fault("a piece of %lld bytes at %lld lies outside the %lld bytes of shared memory asked for", (long long)bytes,
          (long long)*used, (long long)m.shared_bytes);
  if (*pieces == kMaxPieces) fault("more than %d pieces of shared memory", kMaxPieces);
  const auto start = (reinterpret_cast<uintptr_t>(m.shared.data()) + 15) / 16 * 16;
  auto* piece = reinterpret_cast<unsigned char*>(start) + *used + kGap / 2 * (*pieces + 1);
  *used += carved;
  ++*pieces;
#if VIDTOK_ASAN
  __asan_unpoison_memory_region(piece, size_t(bytes));
#endif
  return piece;
}

}  // namespace vidtok::host
