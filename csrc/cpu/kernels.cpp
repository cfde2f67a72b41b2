// Compiled once per instruction set, with STEER_NAMESPACE and the matching compiler flags set by CMakeLists.txt.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "backward.h"
#include "cpu.h"
#include "forward.h"

namespace steer::cpu::STEER_NAMESPACE {

namespace {

void run_forward(const Forward& call, int threads) {
  switch (call.problem.stream) {
    case DType::kFloat32:
      return forward<float, float>(call, threads);
    case DType::kFloat16:
      return forward<float, Half>(call, threads);
    case DType::kBFloat16:
      return forward<float, BFloat16>(call, threads);
    case DType::kFloat64:
      return forward<double, double>(call, threads);
  }
  throw std::invalid_argument("unknown stream type");
}

void run_backward(const Backward& call, int threads) {
  switch (call.problem.stream) {
    case DType::kFloat32:
      return backward<float, float>(call, threads);
    case DType::kFloat16:
      return backward<float, Half>(call, threads);
    case DType::kBFloat16:
      return backward<float, BFloat16>(call, threads);
    case DType::kFloat64:
      return backward<double, double>(call, threads);
  }
  throw std::invalid_argument("unknown stream type");
}

}  // namespace

#define STEER_TEXT(name) #name
#define STEER_NAME(name) STEER_TEXT(name)
const Kernels kernels = {STEER_NAME(STEER_NAMESPACE), run_forward, run_backward};

}  // namespace steer::cpu::STEER_NAMESPACE
