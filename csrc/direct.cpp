#include "direct.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "tensors.h"

namespace py = pybind11;

namespace steer {

namespace {

// What a pass does beyond its tensors, checked by the caller. `top_k` 0 stands for all experts; `automatic` for a backend that
// STEERMOE_BACKEND may name.
struct Settings {
  Norm norm;
  double eps;
  Pool pool;
  std::int64_t pool_size, top_k;
  bool renormalize, automatic;
};

// The kernels that the environment asks for; null where it asks for something that is not to be had here.
const cpu::Kernels* kernels(const Settings& settings) {
  if (settings.automatic) {
    const char* backend = std::getenv("STEERMOE_BACKEND");
    if (backend != nullptr && std::strcmp(backend, "") != 0 && std::strcmp(backend, "auto") != 0 && std::strcmp(backend, "cpu") != 0)
      return nullptr;
  }
  const char* level = std::getenv("STEERMOE_SIMD");
  return cpu::find_kernels(level == nullptr || *level == '\0' ? nullptr : level);
}

bool view_or_none(py::handle object, TensorView& view) { return object.is_none() || view_tensor(object, view); }

Parameter parameter(const TensorView& view) { return {view.data, view.dtype}; }

struct Parameters {
  TensorView weight, bias, vectors, scale, norm_weight, norm_bias;
};

// The problem of steering `stream` (..., D), and whether everything fits.
bool describe(const Settings& settings, const TensorView& stream, const Parameters& given, Problem& p) {
  if (stream.rank < 1 || stream.numel() == 0 || given.weight.rank != 2) return false;
  p.width = stream.shape[stream.rank - 1];
  p.experts = given.weight.shape[0];
  p.top_k = settings.top_k == 0 ? p.experts : settings.top_k;
  if (p.experts < 1 || p.top_k > p.experts) return false;
  const auto fits = [&](const TensorView& view, std::initializer_list<std::int64_t> shape) {
    return view.data == nullptr || view.has_shape(shape);
  };
  const std::int64_t E = p.experts, D = p.width;
  if (!fits(given.weight, {E, D}) || !fits(given.bias, {E}) || !fits(given.vectors, {E, D}) || !fits(given.scale, {})) return false;
  if (!fits(given.norm_weight, {D}) || !fits(given.norm_bias, {D})) return false;
  if (settings.pool == Pool::kNone) {
    p.batch = 1;
    p.time = p.pooled = stream.numel() / D;
  } else {
    if (stream.rank != 3) return false;
    p.batch = stream.shape[0];
    p.time = stream.shape[1];
    p.pooled = (p.time + settings.pool_size - 1) / settings.pool_size;
  }
  p.pool_size = settings.pool_size;
  p.renormalize = settings.renormalize;
  p.norm = settings.norm;
  p.pool = settings.pool;
  p.eps = settings.eps;
  p.stream = stream.dtype;
  p.weight = parameter(given.weight), p.bias = parameter(given.bias), p.vectors = parameter(given.vectors);
  p.scale = parameter(given.scale), p.norm_weight = parameter(given.norm_weight), p.norm_bias = parameter(given.norm_bias);
  return true;
}

DType accumulated(DType stream) { return stream == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

using Shape = std::vector<std::int64_t>;

py::object make(DType dtype, const Shape& shape, bool fill, void*& data) {
  return make_tensor(dtype, shape.data(), static_cast<std::int32_t>(shape.size()), fill, data);
}

bool keeps_probs(const Problem& p) { return !p.dense() && !p.renormalize; }

py::object forward(const Settings& settings, py::handle x, py::handle residual, py::handle weight, py::handle bias, py::handle vectors,
                   py::handle scale, py::handle norm_weight, py::handle norm_bias, int threads, bool fill) {
  TensorView stream, added;
  Parameters given;
  Forward call;
  Problem& p = call.problem;
  if (!view_tensor(x, stream) || !view_or_none(residual, added) || !view_tensor(weight, given.weight) || !view_or_none(bias, given.bias) ||
      !view_tensor(vectors, given.vectors) || !view_tensor(scale, given.scale) || !view_or_none(norm_weight, given.norm_weight) ||
      !view_or_none(norm_bias, given.norm_bias) || !describe(settings, stream, given, p))
    return py::none();
  const Shape shape(stream.shape, stream.shape + stream.rank);
  if (added.data != nullptr && (added.dtype != stream.dtype || Shape(added.shape, added.shape + added.rank) != shape)) return py::none();
  const cpu::Kernels* chosen = kernels(settings);
  if (chosen == nullptr) return py::none();

  call.x = stream.data;
  call.residual = added.data;
  const DType wide = accumulated(stream.dtype);
  Shape per_expert = shape, pooled = shape;
  per_expert.back() = p.experts;
  if (p.pool != Pool::kNone) pooled[1] = p.pooled;
  py::object y = make(stream.dtype, shape, fill, call.y), gates = make(wide, per_expert, fill, call.gates);
  py::object normed = py::none(), probs = py::none(), stats = py::none();
  if (keeps_probs(p)) probs = make(wide, per_expert, fill, call.probs);
  if (p.norm != Norm::kNone) {
    normed = make(stream.dtype, pooled, fill, call.normed);
    stats = make(wide, {2, p.batch, p.pooled}, fill, call.stats);
  }
  {
    py::gil_scoped_release release;
    chosen->forward(call, threads);
  }
  return py::make_tuple(std::move(y), std::move(normed), std::move(gates), std::move(probs), std::move(stats));
}

py::object backward(const Settings& settings, py::handle dy, py::handle dnormed, py::handle dgates, py::handle y, py::handle gates,
                    py::handle probs, py::handle stats, py::handle weight, py::handle vectors, py::handle scale, py::handle norm_weight,
                    const std::array<bool, 7>& needs, int threads, bool fill) {
  TensorView steered, dsteered, dn, dg, g, probabilities, statistics;
  Parameters given;
  Backward call;
  Problem& p = call.problem;
  if (!view_tensor(y, steered) || !view_or_none(dy, dsteered) || !view_or_none(dnormed, dn) || !view_or_none(dgates, dg) ||
      !view_tensor(gates, g) || !view_or_none(probs, probabilities) || !view_or_none(stats, statistics) ||
      !view_tensor(weight, given.weight) || !view_tensor(vectors, given.vectors) || !view_tensor(scale, given.scale) ||
      !view_or_none(norm_weight, given.norm_weight) || !describe(settings, steered, given, p))
    return py::none();
  const DType wide = accumulated(steered.dtype);
  const auto comes_as = [](const TensorView& gradient, DType dtype, std::int64_t numel) {
    return gradient.data == nullptr || (gradient.dtype == dtype && gradient.numel() == numel);
  };
  if (!comes_as(dsteered, steered.dtype, steered.numel()) || !comes_as(dn, steered.dtype, p.batch * p.pooled * p.width) ||
      !comes_as(dg, wide, g.numel()))
    return py::none();
  const cpu::Kernels* chosen = kernels(settings);
  if (chosen == nullptr) return py::none();

  call.dy = dsteered.data, call.dnormed = dn.data, call.dgates = dg.data;
  call.y = steered.data, call.gates = g.data, call.probs = probabilities.data, call.stats = statistics.data;
  const Shape shape(steered.shape, steered.shape + steered.rank), matrix{p.experts, p.width}, row{p.experts}, column{p.width};
  const std::array<const Shape*, 6> shapes{&matrix, &row, &matrix, nullptr, &column, &column};
  const std::array<void**, 6> places{&call.dweight, &call.dbias, &call.dvectors, &call.dscale, &call.dnorm_weight, &call.dnorm_bias};
  py::tuple results(7);
  results[0] = needs[0] ? make(steered.dtype, shape, fill, call.du) : py::none();
  for (std::size_t i = 0; i < places.size(); ++i)
    results[i + 1] = needs[i + 1] ? make(wide, shapes[i] == nullptr ? Shape() : *shapes[i], fill, *places[i]) : py::none();
  {
    py::gil_scoped_release release;
    chosen->backward(call, threads);
  }
  return std::move(results);
}

}  // namespace

void define_direct(py::module_& module) {
  py::class_<Settings>(module, "Settings")
      .def(py::init([](int norm, double eps, int pool, std::int64_t pool_size, std::int64_t top_k, bool renormalize, bool automatic) {
             return Settings{static_cast<Norm>(norm), eps, static_cast<Pool>(pool), pool_size, top_k, renormalize, automatic};
           }),
           py::arg("norm"), py::arg("eps"), py::arg("pool"), py::arg("pool_size"), py::arg("top_k"), py::arg("renormalize"),
           py::arg("automatic"));
  module.def("connect_tensors", &connect_tensors, "Whether tensors of these types can be looked at directly.");
  module.def("direct_forward", &forward);
  module.def("direct_backward", &backward);
}

}  // namespace steer
