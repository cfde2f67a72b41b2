#include "kernel_memory.h"

#include <cstring>

#include "gradient.h"  // of the kernels, for the workspace: compiled for the host, against the emulator

namespace ptx {

namespace {

using steer::Backward;
using steer::DType;
using steer::Forward;
using steer::Problem;
using steer::cuda::Workspace;

// What was written where, from launch to launch: a backward's kernels read what those before them have left.
std::map<std::uint64_t, std::shared_ptr<History>> histories;

std::uint64_t bytes_of(DType type) { return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2; }

class Given {
 public:
  void operand(const char* name, const void* data, std::uint64_t bytes) { add(name, data, bytes, false, nullptr); }

  void result(const char* name, const void* data, std::uint64_t bytes) {
    if (data == nullptr || bytes == 0) return;
    add(name, data, bytes, true, start_history(data, bytes));
    memory.results.push_back(memory.regions.back());
  }

  // Of the workspace. `first`: nobody has written there before.
  void share(const char* name, const float* data, std::uint64_t count, bool first, bool writable) {
    if (data == nullptr) return;
    const auto known = histories.find(reinterpret_cast<std::uint64_t>(data));
    const bool begins = first || known == histories.end() || known->second->size() != 4 * count / kPiece;
    add(name, data, 4 * count, writable, begins ? start_history(data, 4 * count) : known->second);
  }

  void parameters(const Problem& p) {
    const auto parameter = [&](const char* name, const steer::Parameter& given, std::uint64_t count) {
      operand(name, given.data, count * bytes_of(given.dtype));
    };
    parameter("weight", p.weight, p.experts * p.width);
    parameter("bias", p.bias, p.experts);
    parameter("vectors", p.vectors, p.experts * p.width);
    parameter("scale", p.scale, 1);
    parameter("norm_weight", p.norm_weight, p.width);
    parameter("norm_bias", p.norm_bias, p.width);
  }

  GivenMemory memory;

 private:
  static std::shared_ptr<History> start_history(const void* data, std::uint64_t bytes) {
    return histories[reinterpret_cast<std::uint64_t>(data)] = std::make_shared<History>(bytes / kPiece);
  }

  void add(const char* name, const void* data, std::uint64_t bytes, bool writable, std::shared_ptr<History> history) {
    if (data != nullptr) memory.regions.push_back({name, reinterpret_cast<std::uint64_t>(data), bytes, writable, std::move(history)});
  }
};

GivenMemory of_forward(const Forward& call) {
  const Problem& p = call.problem;
  const std::uint64_t stream = p.frames() * p.width * bytes_of(p.stream), gates = 4 * p.frames() * p.experts;
  const std::uint64_t windows = p.batch * p.pooled;
  Given given;
  given.operand("x", call.x, stream);
  given.operand("residual", call.residual, stream);
  given.parameters(p);
  given.result("y", call.y, stream);
  given.result("normed", call.normed, windows * p.width * bytes_of(p.stream));
  given.result("gates", call.gates, gates);
  if (call.probs != call.gates) given.result("probs", call.probs, gates);
  given.result("stats", call.stats, 2 * 4 * windows);
  return std::move(given.memory);
}

GivenMemory of_backward(const std::string& name, const Backward& call, const Workspace& workspace) {
  const bool first = name.find("steer_backward") != std::string::npos, last = name.find("steer_reduction") != std::string::npos;
  const Problem& p = call.problem;
  const std::uint64_t stream = p.frames() * p.width * bytes_of(p.stream), gates = 4 * p.frames() * p.experts;
  const std::uint64_t windows = p.batch * p.pooled, splits = workspace.splits, matrix = p.experts * p.width;
  Given given;
  given.operand("dy", call.dy, stream);
  given.operand("dnormed", call.dnormed, windows * p.width * bytes_of(p.stream));
  given.operand("dgates", call.dgates, gates);
  given.operand("y", call.y, stream);
  given.operand("gates", call.gates, gates);
  if (call.probs != call.gates) given.operand("probs", call.probs, gates);
  given.operand("stats", call.stats, 2 * 4 * windows);
  given.parameters(p);
  if (first) given.result("du", call.du, stream);
  const auto share = [&](const char* part, const float* data, std::uint64_t count) { given.share(part, data, count, first, !last); };
  share("the workspace's row_means", workspace.row_means, 2 * windows);
  share("the workspace's dz", workspace.dz, p.frames() * p.experts);
  share("the workspace's ga", workspace.ga, p.frames());
  share("the workspace's dweight", workspace.dweight, splits * matrix);
  share("the workspace's mixed", workspace.mixed, splits * p.experts * p.experts);
  share("the workspace's dvectors", workspace.dvectors, splits * matrix);
  share("the workspace's dbias", workspace.dbias, splits * p.experts);
  share("the workspace's dscale", workspace.dscale, splits);
  share("the workspace's dgamma", workspace.dgamma, splits * p.width);
  share("the workspace's dbeta", workspace.dbeta, splits * p.width);
  if (last) {
    given.result("dweight", call.dweight, 4 * matrix);
    given.result("dbias", call.dbias, 4 * p.experts);
    given.result("dvectors", call.dvectors, 4 * matrix);
    given.result("dscale", call.dscale, 4);
    given.result("dnorm_weight", call.dnorm_weight, 4 * p.width);
    given.result("dnorm_bias", call.dnorm_bias, 4 * p.width);
  }
  return std::move(given.memory);
}

template <typename T>
T argument(const std::vector<unsigned char>& arguments, std::size_t offset) {
  T value;
  std::memcpy(static_cast<void*>(&value), arguments.data() + offset, sizeof(T));
  return value;
}

}  // namespace

// Every kernel's first argument is the call; a backward's last one, the workspace.
GivenMemory memory_of(const std::string& name, const std::vector<unsigned char>& arguments) {
  if (name.find("steer_forward") != std::string::npos) return of_forward(argument<Forward>(arguments, 0));
  return of_backward(name, argument<Backward>(arguments, 0), argument<Workspace>(arguments, arguments.size() - sizeof(Workspace)));
}

void require_written(const std::string& name, const std::vector<Region>& results) {
  for (const Region& result : results)
    for (std::size_t at = 0; at < result.history->size(); ++at)
      if ((*result.history)[at].launch == 0)
        throw Fault(result.name + " was not written from byte " + std::to_string(at * kPiece) + " on, by " + name);
}

}  // namespace ptx
