#include "direct.h"

#include "../direct.h"
#include "cuda.h"

#if !defined(STEER_TENSORS_DEVICE)
#define STEER_TENSORS_DEVICE steer::Device::kCuda
#endif

namespace py = pybind11;

namespace steer::cuda {

namespace {

// Results and workspace are torch's, from its allocator's pool of torch's current stream: so a CUDA graph can capture a call, and memory
// that is given up while a kernel still works on it is only handed out again to work queued after that kernel.
class Runner {
 public:
  static constexpr const char* kName = "cuda";

  // Torch's allocator fills memory by itself where it is asked to.
  Runner(py::handle tensor, const TensorView& stream) : tensor_(tensor), device_(stream.device) {}

  bool takes(const Problem& p) {
    return device_.type == STEER_TENSORS_DEVICE && p.stream != DType::kFloat64 && current_stream(device_, stream_);
  }

  py::object make(DType dtype, const Shape& shape, void*& data) const { return allocate_tensor(tensor_, dtype, shape, data); }

  bool forward(const Forward& call) const {
    const py::gil_scoped_release release;
    cuda::forward(call, {device_.index, stream_});
    return true;
  }

  bool backward(const Backward& call) const {
    void* memory = nullptr;
    const std::int64_t bytes = workspace_bytes(call, device_.index);
    const py::object workspace = allocate_bytes(bytes, device_, memory);
    if (workspace.is_none()) return false;
    const py::gil_scoped_release release;
    cuda::backward(call, memory, {device_.index, stream_});
    return true;
  }

 private:
  py::handle tensor_;
  Device device_;
  void* stream_ = nullptr;
};

}  // namespace

void define_direct(py::module_& module) { Direct<Runner>::define(module); }

}  // namespace steer::cuda
