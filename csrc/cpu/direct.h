// The way from tensors to tensors for the CPU's kernels: `connect_tensors`, `direct_forward` and `direct_backward` in a Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace steer::cpu {

void define_direct(pybind11::module_& module);

}  // namespace steer::cpu
