#include "../direct.h"

#include <pybind11/gil_safe_call_once.h>

#include "cpu.h"
#include "direct.h"
#include "memory.h"

namespace py = pybind11;

namespace steer::cpu {

namespace {

class Runner {
 public:
  static constexpr const char* kName = "cpu";

  Runner(py::handle, const TensorView& stream, bool fill) : is_here_(stream.device.type == Device::kCpu), fill_(fill) {}

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
    if (fill_) std::memset(data, 0xFF, static_cast<std::size_t>(bytes));  // a NaN in every one of the dtypes
    return adopt_memory(dtype, shape, data, block.size, [](void* memory, std::int64_t size) { give_back({memory, size}); });
  }

  bool forward(const Forward& call) const {
    const int threads = torch_threads();
    const py::gil_scoped_release release;
    kernels_->forward(call, threads);
    return true;
  }

  bool backward(const Backward& call) const {
    const int threads = torch_threads();
    const py::gil_scoped_release release;
    kernels_->backward(call, threads);
    return true;
  }

 private:
  static int torch_threads() {
    // An import may let other threads run, and these must not wait here, holding the interpreter's lock.
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> get;
    get.call_once_and_store_result([] { return py::module_::import("torch").attr("get_num_threads").cast<py::object>(); });
    return get.get_stored()().cast<int>();
  }

  bool is_here_, fill_;
  const Kernels* kernels_ = nullptr;
};

}  // namespace

void define_direct(py::module_& module) { Direct<Runner>::define(module); }

}  // namespace steer::cpu
