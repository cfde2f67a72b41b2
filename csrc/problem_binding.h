// `Problem` for Python, the same in every compiled module. Tensors come as addresses (0: absent) with a type each.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <utility>

#include "steer.h"

namespace steer {

using Address = std::uintptr_t;
using Operand = std::pair<Address, int>;  // with its DType

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline Parameter parameter(Operand operand) { return {pointer(operand.first), static_cast<DType>(operand.second)}; }

// Local to the module: a process may load several of them.
inline void bind_problem(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<Problem>(module, "Problem", py::module_local())
      .def(py::init([](std::array<std::int64_t, 7> sizes, bool renormalize, int norm, int pool, double eps, int stream, Operand weight,
                       Operand bias, Operand vectors, Operand scale, Operand norm_weight, Operand norm_bias) {
             Problem p;
             p.batch = sizes[0], p.time = sizes[1], p.pooled = sizes[2], p.width = sizes[3], p.experts = sizes[4];
             p.top_k = sizes[5], p.pool_size = sizes[6];
             p.renormalize = renormalize;
             p.norm = static_cast<Norm>(norm);
             p.pool = static_cast<Pool>(pool);
             p.eps = eps;
             p.stream = static_cast<DType>(stream);
             p.weight = parameter(weight), p.bias = parameter(bias), p.vectors = parameter(vectors), p.scale = parameter(scale);
             p.norm_weight = parameter(norm_weight), p.norm_bias = parameter(norm_bias);
             return p;
           }),
           py::arg("sizes"), py::arg("renormalize"), py::arg("norm"), py::arg("pool"), py::arg("eps"), py::arg("stream"), py::arg("weight"),
           py::arg("bias"), py::arg("vectors"), py::arg("scale"), py::arg("norm_weight"), py::arg("norm_bias"));
}

}  // namespace steer
