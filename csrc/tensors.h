// PyTorch's tensors without PyTorch's headers, by the exchange that the DLPack standard lays down for C programs (its version 1; torch
// has it from 2.10 on): a table of functions that look at a tensor and make one, in a capsule at the type.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>

#include "steer.h"

namespace steer {

// A tensor as the kernels take it: on the CPU, dense, contiguous, of one of their dtypes.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int32_t rank = 0;
  const std::int64_t* shape = nullptr;

  bool has_shape(std::initializer_list<std::int64_t> wanted) const;
  std::int64_t numel() const;
};

// Gets to know torch.Tensor and torch.nn.Parameter. False if this torch has no such exchange.
bool connect_tensors(pybind11::handle tensor_type, pybind11::handle parameter_type);

// Looks at an object. False unless it is a tensor, or a parameter, that is what TensorView says, not of a subclass, and not a view that
// negates; nothing is raised. The shape lives as long as the tensor does.
bool view_tensor(pybind11::handle object, TensorView& view);

// A new tensor, uninitialised, or with `fill` full of NaN; `data` is where its numbers go. Throws pybind11::error_already_set.
pybind11::object make_tensor(DType dtype, const std::int64_t* shape, std::int32_t rank, bool fill, void*& data);

}  // namespace steer
