// Instead of CUDA's runtime: the functions of it that the package's compiled host code calls, for a GPU that is this interpreter.
//
// The host code is nvcc's, with `-cudart none`. When the module is loaded, it registers each kernel under the address of a function of the
// host; what is launched later is looked up by that address, and its PTX run at once. What is wrong with a kernel becomes the error that
// its launch returns.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "kernel_memory.h"
#include "launch.h"

namespace {

struct Machine {
  int multiprocessors = 3;
  std::int64_t shared_bytes = 163 * 1024;  // that a block may have
};

constexpr std::int64_t kReservedShared = 1024;  // of every block
constexpr std::size_t kUnasked = 48 * 1024;     // bytes of shared memory that a kernel may have without asking for more
constexpr int kThreads = 2048;                  // of a multiprocessor

Machine machine;
std::map<const void*, std::size_t> allowed_shared;
std::string launched, message;
cudaError_t last_error = cudaSuccess;

// Made when it is first asked for: kernels are registered before this file's own variables exist.
std::map<const void*, std::string>& kernel_names() {
  static std::map<const void*, std::string> names;
  return names;
}

cudaError_t fail(cudaError_t error, const std::string& why) {
  message = why;
  return last_error = error;
}

// As in the sources: `steer_forward_kernel` of _ZN5steer4cuda20steer_forward_kernelI...
std::string short_name(const std::string& mangled) {
  const std::size_t start = mangled.find("steer_"), end = mangled.find("_kernel", start);
  return mangled.substr(start, end + 7 - start);
}

void run(const std::string& name, dim3 grid, dim3 threads, void** arguments, std::size_t shared_bytes) {
  const ptx::Kernel& kernel = ptx::find(name);
  std::vector<unsigned char> parameters(kernel.parameter_bytes);
  for (std::size_t k = 0; k < kernel.parameters.size(); ++k)
    std::memcpy(parameters.data() + kernel.parameters[k].offset, arguments[k], kernel.parameters[k].size);
  ptx::GivenMemory memory = ptx::memory_of(name, parameters);
  ptx::run(kernel, {grid.x, grid.y, grid.z}, static_cast<int>(threads.x), shared_bytes, parameters, std::move(memory.regions));
  ptx::require_written(short_name(name), memory.results);
}

}  // namespace

extern "C" {

// --- what compiled host code calls by itself

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernel_names()[host] = name;
}
// For `kernel<<<...>>>`, which the package does not use.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, std::size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t) { std::abort(); }

// --- what the package calls

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice, "there is one device"); }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return message.c_str(); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = machine.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(machine.shared_bytes);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(machine.shared_bytes + kReservedShared);
      return cudaSuccess;
    default:
      return fail(cudaErrorInvalidValue, "an attribute that is not known here");
  }
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return fail(cudaErrorInvalidValue, "an attribute that is not known here");
  if (value > machine.shared_bytes) return fail(cudaErrorInvalidValue, "more shared memory than there is");
  // The package asks once, for all there is: which stays allowed when a test sets another machine.
  allowed_shared[kernel] = value == machine.shared_bytes ? std::numeric_limits<std::size_t>::max() : value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int threads, std::size_t shared_bytes,
                                                                   unsigned) {
  try {
    const std::int64_t room = (machine.shared_bytes + kReservedShared) / (static_cast<std::int64_t>(shared_bytes) + kReservedShared);
    *blocks = static_cast<int>(
        std::min<std::int64_t>({ptx::find(kernel_names().at(kernel)).blocks_per_multiprocessor, kThreads / threads, room}));
    return cudaSuccess;
  } catch (const std::exception& error) {
    return fail(cudaErrorUnknown, error.what());
  }
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 threads, void** arguments, std::size_t shared_bytes, cudaStream_t) {
  const std::string& name = kernel_names().at(kernel);
  launched += short_name(name) + " " + std::to_string(std::size_t{grid.x} * grid.y * grid.z) + "\n";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return fail(cudaErrorInvalidConfiguration, "a grid without blocks, or with too many");
  if (shared_bytes > std::max(kUnasked, allowed_shared[kernel]) || static_cast<std::int64_t>(shared_bytes) > machine.shared_bytes)
    return fail(cudaErrorInvalidValue, "more shared memory than the kernel may have");
  try {
    run(name, grid, threads, arguments, shared_bytes);
    return cudaSuccess;
  } catch (const std::exception& error) {
    return fail(cudaErrorLaunchFailure, error.what());
  }
}

// --- the device's controls, for Python's ctypes: those of cuda_emulator, and the PTX's

void emulator_set_order(int value, unsigned seed) { ptx::set_order(static_cast<ptx::Order>(value), seed); }
void emulator_set_machine(int multiprocessors, std::int64_t shared_bytes) { machine = {multiprocessors, shared_bytes}; }
const char* emulator_take_launched() {
  static std::string lines;
  lines = std::exchange(launched, {});
  return lines.c_str();
}
void interpreter_load(const char* path) { ptx::load(path); }
const char* interpreter_not_understood() {
  static std::string what;
  what = ptx::not_understood();
  return what.c_str();
}
}
