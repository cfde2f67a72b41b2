#include <cstring>

#include "cpu.h"

namespace steer::cpu {

namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

}  // namespace

const Kernels* find_kernels(const char* level) {
#if defined(STEER_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  const Level levels[] = {
#if defined(STEER_X86)
      {&avx512bf16::kernels, avx512bf16},
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
