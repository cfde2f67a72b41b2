#include "passes.h"

namespace steer::cuda {
STEER_PASSES(, Half)
}  // namespace steer::cuda
