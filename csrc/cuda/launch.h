// Launching a kernel, and the machine it runs on.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda.h"
#include "device.h"
#include "plan.h"

namespace steer::cuda {

struct Grid {
  std::int64_t x = 1, y = 1, z = 1;
};

}  // namespace steer::cuda

#if !defined(__CUDACC__)

#include "emulated_launch.h"

#else

namespace steer::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that was reported is not left for the next call to find
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Throws in a process that was forked after CUDA had started: the driver does not survive that.
void refuse_forked_process();

// Makes the device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    refuse_forked_process();
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    moved_ = true;
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

Machine machine_of(int device);

// Lets a kernel have all the shared memory that a block of the current device can have. Always all of it, whatever the launch takes: the
// limit belongs to the kernel, which other threads may be launching, too, and one that set a lower limit would make their launches fail.
void allow_shared_memory(const char* name, const void* kernel);

// Blocks of a kernel that a multiprocessor holds at a time, at least one.
template <typename Kernel>
int resident_blocks(const char* name, Kernel kernel, std::int64_t shared) {
  int blocks = 0;
  allow_shared_memory(name, reinterpret_cast<const void*>(kernel));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared), name);
  return blocks < 1 ? 1 : blocks;
}

template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, std::int64_t shared, Stream stream, Parameters... arguments) {
  void* addresses[] = {&arguments...};
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  allow_shared_memory(name, reinterpret_cast<const void*>(kernel));
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(kThreads), addresses, static_cast<std::size_t>(shared),
                         static_cast<cudaStream_t>(stream.handle)),
        name);
}

}  // namespace steer::cuda

#endif
