#include "passes.h"

namespace steer::cuda {
STEER_PASSES(, BFloat16)
}  // namespace steer::cuda
