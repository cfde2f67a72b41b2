// The way from tensors to tensors for the CUDA kernels: `connect_tensors`, `direct_forward` and `direct_backward` in a Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace steer::cuda {

void define_direct(pybind11::module_& module);

}  // namespace steer::cuda
