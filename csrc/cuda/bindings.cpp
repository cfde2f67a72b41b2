// steermoe_kernels._cuda: the CUDA kernels for Python. Tensors come as addresses (0: absent) with a type each; the caller,
// backends/cuda.py, answers for shapes, layout, lifetime and the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>

#include "../problem_binding.h"
#include "cuda.h"
#include "direct.h"

#if !defined(STEER_MODULE)
#define STEER_MODULE _cuda
#endif

namespace py = pybind11;

namespace {

using steer::Address, steer::pointer;

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

  steer::bind_problem(module);

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
