// A steering pass from tensors to tensors in one call: looking at the arguments, making the results, running the kernels.
//
// What an operator costs in Python, its checks, its results one by one, its operands' addresses, is as much as the arithmetic of a short
// clip, and several times that when other work has driven Python's code from the caches. Here everything is refused that asks for more than
// a look, by answering None: the operator then goes the long way, which also has the sentences for what is wrong.
//
// A Runner is where a call runs:
//   Runner(handle tensor, TensorView stream)  on the stream's device
//   bool takes(Problem)                   whether it can run the problem here and now
//   object make(DType, Shape, void*&)     room for a result, and where its numbers go; None if there is none
//   bool forward(Forward), bool backward(Backward)
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "function.h"
#include "tensors.h"

namespace steer {

// What a pass does beyond its tensors, checked by the caller. `automatic`: the caller named no backend, so that STEERMOE_BACKEND may.
struct Settings {
  Norm norm;
  double eps;
  Pool pool;
  std::int64_t pool_size, top_k, experts;
  bool renormalize, automatic;
};

// Whether the environment leaves an automatic choice to the caller, or names the same backend.
inline bool may_run(const Settings& settings, const char* backend) {
  const char* named = settings.automatic ? std::getenv("STEERMOE_BACKEND") : nullptr;
  return named == nullptr || std::strcmp(named, "") == 0 || std::strcmp(named, "auto") == 0 || std::strcmp(named, backend) == 0;
}

template <typename Runner>
class Direct {
  using Handle = pybind11::handle;
  using Object = pybind11::object;

 public:
  static Object forward(const Settings& settings, PyObject* const* arguments) {
    const auto [x, residual, weight, bias, vectors, scale, norm_weight, norm_bias] = unpack<8>(arguments);
    TensorView stream, added;
    Parameters given;
    Forward call;
    Problem& p = call.problem;
    if (!view_tensor(x, stream) || !view_or_none(residual, added) || !view_tensor(weight, given.weight) ||
        !view_or_none(bias, given.bias) || !view_tensor(vectors, given.vectors) || !view_tensor(scale, given.scale) ||
        !view_or_none(norm_weight, given.norm_weight) || !view_or_none(norm_bias, given.norm_bias) || !describe(settings, stream, given, p))
      return pybind11::none();
    const Shape shape = stream.copy_shape();
    if (added.data != nullptr && (added.dtype != stream.dtype || !(added.device == stream.device) || added.copy_shape() != shape))
      return pybind11::none();
    Runner runner(x, stream);
    if (!may_run(settings, Runner::kName) || !runner.takes(p)) return pybind11::none();

    call.x = stream.data;
    call.residual = added.data;
    const DType wide = accumulated(stream.dtype);
    Shape per_expert = shape, pooled = shape;
    per_expert.back() = p.experts;
    if (p.pool != Pool::kNone) pooled[1] = p.pooled;
    Results<5> results(runner);
    results.make(0, stream.dtype, shape, call.y);
    if (p.norm != Norm::kNone) results.make(1, stream.dtype, pooled, call.normed);
    results.make(2, wide, per_expert, call.gates);
    if (p.keeps_probs()) results.make(3, wide, per_expert, call.probs);
    if (p.norm != Norm::kNone) results.make(4, wide, {2, p.batch, p.pooled}, call.stats);
    return results.complete() && runner.forward(call) ? results.tuple() : pybind11::none();
  }

  static Object backward(const Settings& settings, PyObject* const* arguments) {
    const auto [dy, dnormed, dgates, y, gates, probs, stats, weight, vectors, scale, norm_weight, wishes] = unpack<12>(arguments);
    std::array<bool, 7> needs;
    for (std::size_t i = 0; i < needs.size(); ++i) needs[i] = pybind11::reinterpret_borrow<pybind11::sequence>(wishes)[i].cast<bool>();
    TensorView steered, dsteered, dn, dg, g, probabilities, statistics;
    Parameters given;
    Backward call;
    Problem& p = call.problem;
    if (!view_tensor(y, steered) || !view_or_none(dy, dsteered) || !view_or_none(dnormed, dn) || !view_or_none(dgates, dg) ||
        !view_tensor(gates, g) || !view_or_none(probs, probabilities) || !view_or_none(stats, statistics) ||
        !view_tensor(weight, given.weight) || !view_tensor(vectors, given.vectors) || !view_tensor(scale, given.scale) ||
        !view_or_none(norm_weight, given.norm_weight) || !describe(settings, steered, given, p))
      return pybind11::none();
    const DType wide = accumulated(steered.dtype);
    const auto comes_as = [&](const TensorView& gradient, DType dtype, std::int64_t numel) {
      return gradient.data == nullptr || (gradient.dtype == dtype && gradient.device == steered.device && gradient.numel() == numel);
    };
    if (!comes_as(dsteered, steered.dtype, steered.numel()) || !comes_as(dn, steered.dtype, p.batch * p.pooled * p.width) ||
        !comes_as(dg, wide, g.numel()))
      return pybind11::none();
    Runner runner(y, steered);
    if (!may_run(settings, Runner::kName) || !runner.takes(p)) return pybind11::none();

    call.dy = dsteered.data, call.dnormed = dn.data, call.dgates = dg.data;
    call.y = steered.data, call.gates = g.data, call.probs = probabilities.data, call.stats = statistics.data;
    const Shape matrix{p.experts, p.width}, row{p.experts}, column{p.width};
    Results<7> results(runner);
    if (needs[0]) results.make(0, steered.dtype, steered.copy_shape(), call.du);
    if (needs[1]) results.make(1, wide, matrix, call.dweight);
    if (needs[2]) results.make(2, wide, row, call.dbias);
    if (needs[3]) results.make(3, wide, matrix, call.dvectors);
    if (needs[4]) results.make(4, wide, {}, call.dscale);
    if (needs[5] && dn.data != nullptr) results.make(5, wide, column, call.dnorm_weight);
    if (needs[6] && dn.data != nullptr) results.make(6, wide, column, call.dnorm_bias);
    return results.complete() && runner.backward(call) ? results.tuple() : pybind11::none();
  }

  static void define(pybind11::module_& module) {
    namespace py = pybind11;
    module.def("connect_tensors", &connect_tensors, "Whether tensors of these types can be looked at directly.");
    module.def(
        "direct_way",
        [](int norm, double eps, int pool, std::int64_t pool_size, std::int64_t top_k, bool renormalize, std::int64_t experts,
           bool automatic) {
          const py::capsule state = hold_state(std::unique_ptr<const Settings>(
              new Settings{static_cast<Norm>(norm), eps, static_cast<Pool>(pool), pool_size, top_k, experts, renormalize, automatic}));
          return py::make_tuple(Function<&Direct::forward, 8>::make("direct_forward", state),
                                Function<&Direct::backward, 12>::make("direct_backward", state));
        },
        "The functions forward and backward of such passes.", py::arg("norm"), py::arg("eps"), py::arg("pool"), py::arg("pool_size"),
        py::arg("top_k"), py::arg("renormalize"), py::arg("num_experts"), py::arg("automatic"));
  }

 private:
  struct Parameters {
    TensorView weight, bias, vectors, scale, norm_weight, norm_bias;
  };

  template <std::size_t count>
  class Results {
   public:
    explicit Results(Runner& runner) : runner_(runner) {
      for (Object& object : objects_) object = pybind11::none();
    }
    void make(std::size_t index, DType dtype, const Shape& shape, void*& data) {
      objects_[index] = runner_.make(dtype, shape, data);
      complete_ = complete_ && !objects_[index].is_none();
    }
    bool complete() const { return complete_; }
    Object tuple() {
      pybind11::tuple all(count);
      for (std::size_t i = 0; i < count; ++i) all[i] = std::move(objects_[i]);
      return std::move(all);
    }

   private:
    Runner& runner_;
    std::array<Object, count> objects_;
    bool complete_ = true;
  };

  static bool view_or_none(Handle object, TensorView& view) { return object.is_none() || view_tensor(object, view); }

  static DType accumulated(DType stream) { return stream == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

  // The problem of steering `stream` (..., D). False unless everything fits.
  static bool describe(const Settings& settings, const TensorView& stream, const Parameters& given, Problem& p) {
    if (stream.rank < 1 || stream.numel() == 0) return false;
    p.width = stream.shape[stream.rank - 1];
    p.experts = settings.experts;
    p.top_k = settings.top_k;
    const auto take = [&](const TensorView& view, std::initializer_list<std::int64_t> shape, Parameter& parameter) {
      parameter = {view.data, view.dtype};
      return view.data == nullptr || (view.device == stream.device && view.has_shape(shape));
    };
    const std::int64_t E = p.experts, D = p.width;
    if (!take(given.weight, {E, D}, p.weight) || !take(given.bias, {E}, p.bias) || !take(given.vectors, {E, D}, p.vectors) ||
        !take(given.scale, {}, p.scale) || !take(given.norm_weight, {D}, p.norm_weight) || !take(given.norm_bias, {D}, p.norm_bias))
      return false;
    p.pool = settings.pool;
    p.pool_size = settings.pool_size;
    if (p.pool == Pool::kNone) {
      p.batch = 1;
      p.time = p.pooled = stream.numel() / D;
    } else {
      if (stream.rank != 3) return false;
      p.batch = stream.shape[0];
      p.time = stream.shape[1];
      p.pooled = (p.time + p.pool_size - 1) / p.pool_size;
    }
    p.renormalize = settings.renormalize;
    p.norm = settings.norm;
    p.eps = settings.eps;
    p.stream = stream.dtype;
    return true;
  }
};

}  // namespace steer
