#include <cstring>

#include "cpu.h"

#if defined(STEER_X86)
#include <cpuid.h>
#endif
#if defined(STEER_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace steer::cpu {

namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

#if defined(STEER_X86)
// What compilers' __builtin_cpu_supports does not know in every version. Asked once: on a virtual machine the host has to answer.
bool has_f16c() {
  static const bool found = [] {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
  }();
  return found;
}

[[maybe_unused]] bool has_avx512bf16() {
  static const bool found = [] {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 5)) != 0;
  }();
  return found;
}
#endif

#if defined(STEER_AMX)
// Whether the processor has the matrix unit with bfloat16, and Linux lets this process use it. It has to be asked: a thread's state grows
// by 8 kB, and a process with signal stacks too small for that is refused.
bool tiles_granted() {
  static const bool granted = [] {
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;  // leaf 7, EDX
    constexpr long kRequest = 0x1023, kTileData = 18;            // ARCH_REQ_XCOMP_PERM
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    return (edx & kBFloat16) != 0 && (edx & kTiles) != 0 && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
}
#endif

}  // namespace

const Kernels* find_kernels(const char* level) {
#if defined(STEER_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#if defined(STEER_AVX512BF16)
  const bool avx512bf16 = avx512 && has_avx512bf16();
#endif
#if defined(STEER_AMX)
  const bool amx = avx512bf16 && (level == nullptr || std::strcmp(level, amx::kernels.name) == 0) && tiles_granted();
#endif
  const Level levels[] = {
#if defined(STEER_AMX)
      {&amx::kernels, amx},
#endif
#if defined(STEER_AVX512BF16)
      {&avx512bf16::kernels, avx512bf16},
#endif
#if defined(STEER_X86)
      {&avx512::kernels, avx512},
      {&avx2::kernels, avx2},
#endif
      {&portable::kernels, true},
  };
  for (const Level& candidate : levels)
    if (candidate.supported && (level == nullptr || std::strcmp(level, candidate.kernels->name) == 0)) return candidate.kernels;
  return nullptr;
}

}  // namespace steer::cpu
