// PyTorch's tensors without PyTorch's headers, by the exchange that the DLPack standard lays down for C programs (its version 1, as
// torch 2.11 and later have it): a table of functions that look at a tensor and make one, in a capsule at the type.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "steer.h"

namespace steer {

using Shape = std::vector<std::int64_t>;

// As the standard numbers types of devices.
struct Device {
  static constexpr std::int32_t kCpu = 1, kCuda = 2;

  std::int32_t type = kCpu, index = 0;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// A tensor as the kernels take it: dense, contiguous, of one of their dtypes.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  std::int32_t rank = 0;
  const std::int64_t* shape = nullptr;

  std::int64_t numel() const;
  bool has_shape(std::initializer_list<std::int64_t> wanted) const;
  Shape copy_shape() const { return Shape(shape, shape + rank); }
};

// Registers torch's two tensor types. False if this torch has no such exchange.
bool connect_tensors(pybind11::handle tensor_type, pybind11::handle parameter_type);

// Looks at an object. False unless it is a tensor, or a parameter, that is what TensorView says, not of a subclass, and not a view that
// negates; nothing is raised. The shape lives as long as the tensor does.
bool view_tensor(pybind11::handle object, TensorView& view);

// The number of rows of a matrix, without all that `view_tensor` asks, which takes time. False unless the object is a tensor or parameter,
// of two dimensions; nothing is raised.
bool view_rows(pybind11::handle object, std::int64_t& rows);

// A contiguous tensor on the CPU in the memory at `data`, which `free(data, size)` takes back when its time has come. None where torch
// refuses.
pybind11::object adopt_memory(DType dtype, const Shape& shape, void* data, std::int64_t size, void (*free)(void*, std::int64_t));

// A contiguous tensor on the device of the tensor `like`, uninitialised; `data` is where its numbers go. None where torch refuses. By
// `like.new_empty`: a tensor out of the exchange borrows its memory, which torch then neither resizes nor, by `record_stream`, keeps from
// being handed out again while another stream works on it.
pybind11::object allocate_tensor(pybind11::handle like, DType dtype, const Shape& shape, void*& data);

// Memory of torch's for as long as the object lives, which is a tensor of the exchange. None where torch refuses.
pybind11::object allocate_bytes(std::int64_t bytes, Device device, void*& data);

// Torch's current stream of a device, a cudaStream_t. False where torch cannot say.
bool current_stream(Device device, void*& stream);

// Torch's threads on the CPU.
int thread_count();

// Whether torch fills memory that nobody has written yet.
bool fills_memory();

std::int64_t bytes_of(DType dtype);

}  // namespace steer
