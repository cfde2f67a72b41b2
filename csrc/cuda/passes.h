// The launches of a pass over one type of stream. Compiled once a type, in a file of its own.
#pragma once

#include "launch.h"
#include "plain.h"

namespace steer::cuda {

template <typename S>
void forward_pass(const Forward& call, const Machine& machine, Stream stream) {
  Plan plan;
  if (!fast(call) || !plan_forward<S>(call, machine, plan)) {
    plan = plan_plain(call.problem, machine);
    launch("steer_forward_plain_kernel", &steer_forward_plain_kernel<S>, Grid{plan.blocks}, plan.shared_bytes, stream, call, plan);
    return;
  }
  const auto run = [&](auto kernel) {
    const std::int64_t places = std::int64_t{machine.multiprocessors} * resident_blocks("steer_forward_kernel", kernel, plan.shared_bytes);
    launch("steer_forward_kernel", kernel, Grid{std::min(plan.tiles(), places)}, plan.shared_bytes, stream, call, plan);
  };
  if (call.problem.weight.dtype == DType::kFloat32)
    run(&steer_forward_kernel<S, float>);
  else
    run(&steer_forward_kernel<S, S>);
}

// How a backward is run; `base` null: to learn what workspace it takes.
struct BackwardPlan {
  bool fast = false, again = false;  // again: a second kernel for the parameters' gradients
  Plan first, second;
  Workspace workspace;
  std::int64_t bytes = 0;
};

template <typename S>
BackwardPlan plan_backward_pass(const Backward& call, const Machine& machine, float* base) {
  BackwardPlan plan;
  plan.fast = fast(call) && plan_backward<S>(call, machine, plan.first);
  int splits = plan.first.blocks;
  if (plan.fast) {
    plan.again = wants_parameters(call) && !holds(call);
    if (plan.again) {
      plan_parameters<S>(call, machine, plan.second);
      splits = plan.second.blocks;
      plan.fast = plan.second.shared_bytes <= machine.shared_per_block;
    }
  }
  if (!plan.fast) {
    plan.first = plan.second = plan_plain(call.problem, machine);
    plan.again = wants_parameters(call);
    const std::int64_t windows = plan.first.clips * plan.first.clip_windows;
    plan.second.blocks = splits = static_cast<int>(std::clamp<std::int64_t>(windows / 64, 1, machine.multiprocessors));
  }
  plan.workspace = lay_out(call, splits, plan.again, base, &plan.bytes);
  return plan;
}

template <typename S>
Workspace backward_pass(const Backward& call, const Machine& machine, float* base, Stream stream) {
  const BackwardPlan plan = plan_backward_pass<S>(call, machine, base);
  const Problem& p = call.problem;
  if (!plan.fast) {
    if (call.du != nullptr || plan.again)
      launch("steer_backward_plain_kernel", &steer_backward_plain_kernel<S>, Grid{plan.first.blocks}, plan.first.shared_bytes, stream, call,
             plan.first, plan.workspace);
    if (plan.again) {
      const std::int64_t strips = (p.width + kWarpSize - 1) / kWarpSize + (p.experts + kWarpSize - 1) / kWarpSize;
      const Grid grid{strips, plan.second.blocks, (p.experts + kPlainExperts - 1) / kPlainExperts};
      launch("steer_parameters_plain_kernel", &steer_parameters_plain_kernel<S>, grid,
             std::int64_t{4} * kWarps * (2 * kPlainExperts + 4) * kWarpSize, stream, call, plan.second, plan.workspace);
    }
    return plan.workspace;
  }
  const bool sums = holds(call) && wants_parameters(call);
  const auto run = [&](auto kernel) {
    // A block that holds sums writes one of the workspace's shares of them. The others are as many as there is room for.
    const std::int64_t blocks =
        sums ? plan.first.blocks
             : std::min(plan.first.tiles(),
                        std::int64_t{machine.multiprocessors} * resident_blocks("steer_backward_kernel", kernel, plan.first.shared_bytes));
    launch("steer_backward_kernel", kernel, Grid{blocks}, plan.first.shared_bytes, stream, call, plan.first, plan.workspace);
  };
  if (p.weight.dtype == DType::kFloat32)
    run(sums ? &steer_backward_kernel<S, float, kHeldSteps> : &steer_backward_kernel<S, float, 0>);
  else
    run(sums ? &steer_backward_kernel<S, S, kHeldSteps> : &steer_backward_kernel<S, S, 0>);
  if (plan.again) {
    const std::int64_t strips = (p.width + kMixStep - 1) / kMixStep + (p.experts + kMixStep - 1) / kMixStep;
    const auto kernel = few_groups(p) ? &steer_parameters_kernel<S, kFewGroups> : &steer_parameters_kernel<S, kAllGroups>;
    launch("steer_parameters_kernel", kernel, Grid{strips, plan.second.blocks}, plan.second.shared_bytes, stream, call, plan.second,
           plan.workspace);
  }
  return plan.workspace;
}

#define STEER_PASSES(prefix, S)                                                                \
  prefix template void forward_pass<S>(const Forward&, const Machine&, Stream);                \
  prefix template BackwardPlan plan_backward_pass<S>(const Backward&, const Machine&, float*); \
  prefix template Workspace backward_pass<S>(const Backward&, const Machine&, float*, Stream);

}  // namespace steer::cuda
