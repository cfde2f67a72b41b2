// steermoe_kernels._cuda: the CUDA kernels for Python. Tensors come as addresses (0: absent) with a type each; the caller,
// backends/cuda.py, answers for shapes, layout, lifetime and the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>

#include "cuda.h"
#include "direct.h"

#if !defined(STEER_MODULE)
#define STEER_MODULE _cuda
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Operand = std::pair<Address, int>;

steer::Parameter parameter(Operand tensor) {
  return {reinterpret_cast<const void*>(tensor.first), static_cast<steer::DType>(tensor.second)};
}

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// A call's addresses, in the order of the struct.
steer::Forward forward_of(const steer::Problem& problem, const std::array<Address, 7>& at) {
  return {problem, pointer(at[0]), pointer(at[1]), pointer(at[2]), pointer(at[3]), pointer(at[4]), pointer(at[5]), pointer(at[6])};
}

steer::Backward backward_of(const steer::Problem& problem, const std::array<Address, 7>& at, const std::array<Address, 7>& results) {
  return {problem,
          pointer(at[0]),
          pointer(at[1]),
          pointer(at[2]),
          pointer(at[3]),
          pointer(at[4]),
          pointer(at[5]),
          pointer(at[6]),
          pointer(results[0]),
          pointer(results[1]),
          pointer(results[2]),
          pointer(results[3]),
          pointer(results[4]),
          pointer(results[5]),
          pointer(results[6])};
}

}  // namespace

PYBIND11_MODULE(STEER_MODULE, module) {
  using steer::Problem;
  using Addresses = std::array<Address, 7>;

  py::class_<Problem>(module, "Problem", py::module_local())
      .def(py::init([](std::array<std::int64_t, 7> sizes, bool renormalize, int norm, int pool, double eps, int stream, Operand weight,
                       Operand bias, Operand vectors, Operand scale, Operand norm_weight, Operand norm_bias) {
             Problem p;
             p.batch = sizes[0], p.time = sizes[1], p.pooled = sizes[2], p.width = sizes[3], p.experts = sizes[4];
             p.top_k = sizes[5], p.pool_size = sizes[6];
             p.renormalize = renormalize;
             p.norm = static_cast<steer::Norm>(norm);
             p.pool = static_cast<steer::Pool>(pool);
             p.eps = eps;
             p.stream = static_cast<steer::DType>(stream);
             p.weight = parameter(weight), p.bias = parameter(bias), p.vectors = parameter(vectors), p.scale = parameter(scale);
             p.norm_weight = parameter(norm_weight), p.norm_bias = parameter(norm_bias);
             return p;
           }),
           py::arg("sizes"), py::arg("renormalize"), py::arg("norm"), py::arg("pool"), py::arg("eps"), py::arg("stream"), py::arg("weight"),
           py::arg("bias"), py::arg("vectors"), py::arg("scale"), py::arg("norm_weight"), py::arg("norm_bias"));

  module.def(
      "forward",
      [](const Problem& problem, Addresses addresses, int device, Address stream) {
        py::gil_scoped_release release;
        steer::cuda::forward(forward_of(problem, addresses), {device, pointer(stream)});
      },
      "Addresses: x, residual, y, normed, gates, probs, stats.", py::arg("problem"), py::arg("addresses"), py::arg("device"),
      py::arg("stream"));

  module.def(
      "workspace_bytes",
      [](const Problem& problem, Addresses addresses, Addresses results, int device) {
        return steer::cuda::workspace_bytes(backward_of(problem, addresses, results), device);
      },
      "What `backward` of the same call takes as its workspace.", py::arg("problem"), py::arg("addresses"), py::arg("results"),
      py::arg("device"));

  module.def(
      "backward",
      [](const Problem& problem, Addresses addresses, Addresses results, Address workspace, int device, Address stream) {
        py::gil_scoped_release release;
        steer::cuda::backward(backward_of(problem, addresses, results), pointer(workspace), {device, pointer(stream)});
      },
      "Addresses: dy, dnormed, dgates, y, gates, probs, stats; results: du, dweight, dbias, dvectors, dscale, dnorm_weight, dnorm_bias.",
      py::arg("problem"), py::arg("addresses"), py::arg("results"), py::arg("workspace"), py::arg("device"), py::arg("stream"));

  module.def(
      "forward_path",
      [](const Problem& problem, Addresses addresses, int device) { return steer::cuda::path_of(forward_of(problem, addresses), device); },
      "'fast' or 'plain': the kernels that take the call.", py::arg("problem"), py::arg("addresses"), py::arg("device"));

  module.def(
      "backward_path",
      [](const Problem& problem, Addresses addresses, Addresses results, int device) {
        return steer::cuda::path_of(backward_of(problem, addresses, results), device);
      },
      "'fast' or 'plain': the kernels that take the call.", py::arg("problem"), py::arg("addresses"), py::arg("results"),
      py::arg("device"));

  steer::cuda::define_direct(module);

  module.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{{"architectures", steer::cuda::architectures()}, {"toolkit", steer::cuda::toolkit()}};
      },
      "The architectures compiled in, and CUDA's version.");
}
