#include "cpu/isa.h"

#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pe {
namespace {

#if defined(__x86_64__)
// Linux keeps the AMX tile registers off until a process asks for them (arch_prctl, since 5.16).
bool amx_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool cpu_has_amx_bf16() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16 and AMX-TILE, leaf 7.0
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::scalar;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return cpu_has_amx_bf16() && amx_granted() ? Isa::amx : Isa::avx512_bf16;
#else
  return Isa::scalar;
#endif
}

std::atomic<Isa>& in_use() {
  static std::atomic<Isa> level{best_isa()};
  return level;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() { return in_use().load(std::memory_order_relaxed); }

void set_isa(Isa level) { in_use().store(level, std::memory_order_relaxed); }

}  // namespace pe
