#include "cpu/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef VIDTOK_X86
#include <cpuid.h>
#endif

namespace vidtok {
namespace {

#ifdef VIDTOK_X86
struct Features {
  bool avx2_set, avx512_set, avx512bf16_set;
};

// Every flag that the build gives a unit is checked, and XCR0 says whether the operating system
// saves the registers: a processor may have AVX-512 that a hypervisor or kernel keeps closed.
Features detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Features out{false, false, false};
  if (!__get_cpuid(1, &a, &b, &c, &d)) return out;
  const bool osxsave = c & (1u << 27), avx = c & (1u << 28), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave || !avx) return out;
  unsigned lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  const bool ymm = (lo & 0x6) == 0x6, zmm = (lo & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return out;
  const auto bit = [](unsigned word, int n) { return (word & (1u << n)) != 0; };
  out.avx2_set = ymm && fma && f16c && bit(b, 5);
  out.avx512_set = out.avx2_set && zmm && bit(b, 16) && bit(b, 30) && bit(b, 17) && bit(b, 31) && bit(b, 28);
  const unsigned leaves = a;
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) out.avx512bf16_set = out.avx512_set && bit(a, 5);
  return out;
}
#endif

const Kernels* table(Isa isa) {
#ifdef VIDTOK_X86
  if (isa == Isa::avx512bf16) return &kernels_avx512bf16;
  if (isa == Isa::avx512) return &kernels_avx512;
  if (isa == Isa::avx2) return &kernels_avx2;
#endif
  (void)isa;
  return &kernels_scalar;
}

Isa choose() {
  int best = 0;
  for (int i = 1; i < kIsaCount; ++i)
    if (supported(static_cast<Isa>(i))) best = i;
  const char* wanted = std::getenv("VIDTOK_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return static_cast<Isa>(best);
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) != 0) continue;
    if (supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
    std::fprintf(stderr, "vidtok: VIDTOK_CPU_ISA=%s cannot run on this processor; using %s\n", wanted, kIsaNames[best]);
    return static_cast<Isa>(best);
  }
  std::fprintf(stderr, "vidtok: expected VIDTOK_CPU_ISA among scalar, avx2, avx512, avx512bf16, got %s; using %s\n",
               wanted, kIsaNames[best]);
  return static_cast<Isa>(best);
}

std::atomic<int> chosen{-1};

}  // namespace

bool supported(Isa isa) {
  if (isa == Isa::scalar) return true;
#ifdef VIDTOK_X86
  static const Features features = detect();
  if (isa == Isa::avx2) return features.avx2_set;
  if (isa == Isa::avx512) return features.avx512_set;
  return features.avx512bf16_set;
#else
  return false;
#endif
}

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(choose());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

bool set_isa(Isa isa) {
  if (!supported(isa)) return false;
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

const Kernels& kernels() { return *table(current_isa()); }

}  // namespace vidtok
