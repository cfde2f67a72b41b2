#include "../direct.h"

#include "cpu.h"
#include "direct.h"
#include "memory.h"

namespace py = pybind11;

namespace steer::cpu {

namespace {

class Runner {
 public:
  static constexpr const char* kName = "cpu";

  Runner(py::handle, const TensorView& stream) : is_here_(stream.device.type == Device::kCpu), fills_(fills_memory()) {}

  bool takes(const Problem&) {
    const char* level = std::getenv("STEERMOE_SIMD");
    kernels_ = find_kernels(level == nullptr || *level == '\0' ? nullptr : level);
    return is_here_ && kernels_ != nullptr;
  }

  py::object make(DType dtype, const Shape& shape, void*& data) const {
    std::int64_t bytes = bytes_of(dtype);
    for (const std::int64_t size : shape) bytes *= size;
    const Block block = take_block(bytes);
    if (block.data == nullptr) return py::none();
    data = block.data;
    if (fills_) std::memset(data, 0xFF, static_cast<std::size_t>(bytes));  // a NaN in every one of the dtypes
    const auto free = [](void* memory, std::int64_t size) { give_back({memory, size, false}); };
    const auto keep = [](void* memory, std::int64_t size) { give_back({memory, size, true}); };
    return block.kept ? adopt_memory(dtype, shape, data, block.size, keep) : adopt_memory(dtype, shape, data, block.size, free);
  }

  bool forward(const Forward& call) const {
    const int threads = thread_count();
    const py::gil_scoped_release release;
    kernels_->forward(call, threads);
    return true;
  }

  bool backward(const Backward& call) const {
    const int threads = thread_count();
    const py::gil_scoped_release release;
    kernels_->backward(call, threads);
    return true;
  }

 private:
  bool is_here_, fills_;
  const Kernels* kernels_ = nullptr;
};

}  // namespace

void define_direct(py::module_& module) { Direct<Runner>::define(module); }

}  // namespace steer::cpu
