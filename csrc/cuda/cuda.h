// Entry points of the CUDA backend.
//
// Calls wait for nothing and allocate nothing, so that a CUDA graph can capture them; what a backward needs besides its results is one
// workspace, which the caller owns, aligned to 16 bytes. They throw std::runtime_error, with the kernel's name, for whatever CUDA refuses.
#pragma once

#include <cstdint>
#include <string>

#include "../steer.h"

namespace steer::cuda {

// Where a call runs: a device's index and a cudaStream_t of it.
struct Stream {
  int device = 0;
  void* handle = nullptr;
};

void forward(const Forward& call, Stream stream);
std::int64_t workspace_bytes(const Backward& call, int device);
void backward(const Backward& call, void* workspace, Stream stream);

// "fast" or "plain": the kernels that take the call.
std::string path_of(const Forward& call, int device);
std::string path_of(const Backward& call, int device);

// The architectures compiled in, and CUDA's version.
std::string architectures();
std::string toolkit();

}  // namespace steer::cuda
