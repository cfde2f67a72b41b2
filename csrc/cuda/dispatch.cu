// From the stream's type to its kernels; then the sum over the splits, which is the same for all.
#include "passes.h"
#include "reduction.h"

#if defined(__CUDACC__)
#include <pthread.h>

#include <atomic>
#include <mutex>
#include <set>
#include <utility>
#endif

namespace steer::cuda {

STEER_PASSES(extern, float)
STEER_PASSES(extern, Half)
STEER_PASSES(extern, BFloat16)

namespace {

// `work(type)` for the type of the stream, as a value of it.
template <typename Work>
auto with_stream_type(const Problem& problem, Work work) {
  if (problem.experts > kMaxExperts)
    throw std::runtime_error("the CUDA kernels take up to 256 experts, got " + std::to_string(problem.experts));
  switch (problem.stream) {
    case DType::kFloat32:
      return work(float{});
    case DType::kFloat16:
      return work(Half{});
    case DType::kBFloat16:
      return work(BFloat16{});
    default:
      throw std::runtime_error("the CUDA kernels take streams in float32, float16 and bfloat16");
  }
}

}  // namespace

void forward(const Forward& call, Stream stream) {
  const DeviceGuard guard(stream.device);
  const Machine machine = machine_of(stream.device);
  with_stream_type(call.problem, [&](auto type) { forward_pass<decltype(type)>(call, machine, stream); });
}

std::int64_t workspace_bytes(const Backward& call, int device) {
  const DeviceGuard guard(device);
  const Machine machine = machine_of(device);
  return with_stream_type(call.problem, [&](auto type) { return plan_backward_pass<decltype(type)>(call, machine, nullptr).bytes; });
}

void backward(const Backward& call, void* workspace, Stream stream) {
  const DeviceGuard guard(stream.device);
  const Machine machine = machine_of(stream.device);
  const Workspace parts = with_stream_type(
      call.problem, [&](auto type) { return backward_pass<decltype(type)>(call, machine, static_cast<float*>(workspace), stream); });
  if (!wants_parameters(call)) return;
  const std::int64_t columns = (call.problem.width + kReductionColumns - 1) / kReductionColumns;
  const std::int64_t shared = 4 * (kWarps * kReductionColumns + call.problem.experts);
  launch("steer_reduction_kernel", &steer_reduction_kernel, Grid{columns, call.problem.experts + 1}, shared, stream, call, parts);
}

std::string path_of(const Forward& call, int device) {
  const Machine machine = machine_of(device);
  Plan plan;
  return with_stream_type(call.problem, [&](auto type) { return fast(call) && plan_forward<decltype(type)>(call, machine, plan); })
             ? "fast"
             : "plain";
}

std::string path_of(const Backward& call, int device) {
  const Machine machine = machine_of(device);
  return with_stream_type(call.problem, [&](auto type) { return plan_backward_pass<decltype(type)>(call, machine, nullptr).fast; })
             ? "fast"
             : "plain";
}

#if defined(__CUDACC__)

namespace {

std::atomic<bool> started{false}, forked{false};

}  // namespace

void refuse_forked_process() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = started.load(); });
  static_cast<void>(registered);
  if (forked)
    throw std::runtime_error(
        "this process was forked after its parent had used the CUDA kernels, which CUDA does not survive: start it with the 'spawn' "
        "method");
  started = true;
}

Machine machine_of(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  Machine machine;
  machine.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  machine.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  machine.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return machine;
}

void allow_shared_memory(const char* name, const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return;  // asking the driver again can make it wait for copies that are under way
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
  allowed.insert({kernel, device});
}

std::string architectures() { return STEER_ARCHITECTURES; }
std::string toolkit() { return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10); }

#endif

}  // namespace steer::cuda
