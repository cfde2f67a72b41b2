// A steering pass from tensors to tensors in one call: looking at the arguments, making the results, running the CPU kernels.
//
// What an operator costs in Python, its checks, its results one by one, its operands' addresses, is as much as the arithmetic of a short
// clip, and several times that when other work has driven Python's code from the caches. Here everything is refused that asks for more than
// a look, by answering None: backends/cpu.py then goes the long way, which also has the sentences for what is wrong.
#pragma once

#include <pybind11/pybind11.h>

namespace steer {

void define_direct(pybind11::module_& module);

}  // namespace steer
