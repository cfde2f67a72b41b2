// steermoe_kernels._cpu: the CPU kernels for Python. Tensors come as addresses (0: absent) with a type each; the caller, backends/cpu.py,
// answers for shapes, layout and lifetime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "cpu/cpu.h"
#include "cpu/direct.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "eager.h"
#include "problem_binding.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

using steer::Address, steer::pointer;

// PyTorch takes a stream's memory from the C library, fresh.
void prefer_huge_pages(const steer::Problem& p, void* stream, std::int64_t frames) {
  steer::cpu::prefer_huge_pages(stream, frames * p.width * steer::bytes_of(p.stream));
}

const steer::cpu::Kernels& kernels(const std::string& level) {
  const steer::cpu::Kernels* found = steer::cpu::find_kernels(level.empty() ? nullptr : level.c_str());
  if (found == nullptr) throw std::invalid_argument("STEERMOE_SIMD: this processor or build has no kernels for '" + level + "'");
  return *found;
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", STEER_COMPILER}, {"flags", STEER_FLAGS}, {"simd levels", STEER_LEVELS}, {"threads", steer::cpu::parallel_runtime()}};
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using steer::Backward;
  using steer::Forward;
  using steer::Problem;

  steer::bind_problem(module);

  module.def(
      "forward",
      [](const Problem& problem, Address x, Address residual, Address y, Address normed, Address gates, Address probs, Address stats,
         int threads, const std::string& level) {
        const Forward call{problem,         pointer(x),     pointer(residual), pointer(y),
                           pointer(normed), pointer(gates), pointer(probs),    pointer(stats)};
        py::gil_scoped_release release;
        prefer_huge_pages(problem, call.y, problem.frames());
        prefer_huge_pages(problem, call.normed, problem.batch * problem.pooled);
        kernels(level).forward(call, threads);
      },
      py::arg("problem"), py::arg("x"), py::arg("residual"), py::arg("y"), py::arg("normed"), py::arg("gates"), py::arg("probs"),
      py::arg("stats"), py::arg("threads"), py::arg("level") = "");

  module.def(
      "backward",
      [](const Problem& problem, Address dy, Address dnormed, Address dgates, Address y, Address gates, Address probs, Address stats,
         std::array<Address, 7> results, int threads, const std::string& level) {
        const Backward call{problem,
                            pointer(dy),
                            pointer(dnormed),
                            pointer(dgates),
                            pointer(y),
                            pointer(gates),
                            pointer(probs),
                            pointer(stats),
                            pointer(results[0]),
                            pointer(results[1]),
                            pointer(results[2]),
                            pointer(results[3]),
                            pointer(results[4]),
                            pointer(results[5]),
                            pointer(results[6])};
        py::gil_scoped_release release;
        prefer_huge_pages(problem, call.du, problem.frames());
        kernels(level).backward(call, threads);
      },
      py::arg("problem"), py::arg("dy"), py::arg("dnormed"), py::arg("dgates"), py::arg("y"), py::arg("gates"), py::arg("probs"),
      py::arg("stats"), py::arg("results"), py::arg("threads"), py::arg("level") = "");

  steer::cpu::define_direct(module);
  steer::define_eager(module);
  module.def("kept_bytes", &steer::cpu::kept_bytes, "Memory of results that are gone, kept for the next ones.");
  module.def("simd_level", [] { return kernels("").name; }, "The instruction set chosen for this processor.");
  module.def("has_level", [](const std::string& level) { return steer::cpu::find_kernels(level.c_str()) != nullptr; }, py::arg("level"));
  module.def("build_info", &build_info, "How the module was compiled, and the OpenMP runtime it shares.");
}
