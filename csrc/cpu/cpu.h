// Entry points of the CPU backend. The same kernels are compiled once per instruction set, each in a namespace of its own, and the best
// that the processor has is chosen at run time.
#pragma once

#include "../steer.h"

namespace steer::cpu {

struct Kernels {
  const char* name;
  void (*forward)(const Forward&, int threads);
  void (*backward)(const Backward&, int threads);
};

#if defined(STEER_AMX)
namespace amx {
extern const Kernels kernels;
}
#endif
#if defined(STEER_AVX512BF16)
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif
#if defined(STEER_X86)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

// The kernels for this processor, or those named `level`, if the processor can run them; null for an unknown or unsupported level.
const Kernels* find_kernels(const char* level = nullptr);

}  // namespace steer::cpu
