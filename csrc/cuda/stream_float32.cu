#include "passes.h"

namespace steer::cuda {
STEER_PASSES(, float)
}  // namespace steer::cuda
