#include "eager.h"

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "function.h"
#include "tensors.h"

namespace py = pybind11;

namespace steer {

namespace {

constexpr std::size_t kTensors = 8, kGradients = 7, kMostKnown = 64;

py::object checked(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object call(py::handle function, PyObject* const* arguments = nullptr, std::size_t count = 0) {
  return checked(PyObject_Vectorcall(function.ptr(), arguments, count, nullptr));
}

py::object attribute(py::handle object, py::handle name) { return checked(PyObject_GetAttr(object.ptr(), name.ptr())); }

py::object intern(const char* name) { return checked(PyUnicode_InternFromString(name)); }

bool is_true(const py::object& answer) {
  const int truth = PyObject_IsTrue(answer.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

// Whether two settings are equal in value and in type: 1 is not True.
bool is_same(py::handle one, py::handle other) {
  if (one.is(other)) return true;
  const bool plain = PyUnicode_CheckExact(one.ptr()) || PyLong_CheckExact(one.ptr()) || PyFloat_CheckExact(one.ptr());
  return plain && Py_TYPE(one.ptr()) == Py_TYPE(other.ptr()) && PyObject_RichCompareBool(one.ptr(), other.ptr(), Py_EQ) == 1;
}

// What is asked of Python; `steermoe_kernels/eager.py` has the answers.
struct Eager {
  py::tuple watchers;   // functions, any of which says yes where somebody wants to see operators go by
  py::object records;   // whether autograd does
  py::object hooks;     // what packs that which autograd keeps; None if nothing does
  py::object prefer;    // (x, weight): the name of the backend preferred for a stream that is not on the CPU, or None
  py::object find;      // (device, dtype, num_experts, preferred, *settings): the way, which begins with forward and backward; or None
  py::object remember;  // (*tensors, way, results): y, normed and gates, for which autograd knows the way back

  struct Known {
    Device device;
    DType dtype;
    std::int64_t num_experts;
    py::object preferred;
    py::tuple settings;
    py::object way;
  };
  std::vector<Known> known = {};  // the oldest first

  py::object requires_grad = intern("requires_grad"), way = intern("way"), needs_input_grad = intern("needs_input_grad");

  bool is_watched() const {
    return std::any_of(watchers.begin(), watchers.end(), [](py::handle watcher) { return is_true(call(watcher)); });
  }

  bool may_need_gradients(PyObject* const* tensors) const {
    return std::any_of(tensors, tensors + kTensors,
                       [&](PyObject* tensor) { return tensor != Py_None && is_true(attribute(tensor, requires_grad)); });
  }

  // None, too, for a weight that is no matrix.
  py::object find_way(const TensorView& stream, py::handle x, py::handle weight, const py::tuple& settings) {
    std::int64_t num_experts;
    if (!view_rows(weight, num_experts)) return py::none();
    const py::object preferred = stream.device.type == Device::kCpu ? py::none() : prefer(x, weight);
    for (const Known& one : known)
      if (one.device == stream.device && one.dtype == stream.dtype && one.num_experts == num_experts && is_same(one.preferred, preferred) &&
          std::equal(one.settings.begin(), one.settings.end(), settings.begin(), settings.end(), is_same))
        return one.way;
    const py::object found = find(x.attr("device"), x.attr("dtype"), num_experts, preferred, *settings);
    if (known.size() == kMostKnown) known.erase(known.begin());
    known.push_back({stream.device, stream.dtype, num_experts, preferred, settings, found});
    return found;
  }
};

// x, residual, weight, bias, vectors, scale, norm_weight, norm_bias; the settings.
py::object steer(Eager& eager, PyObject* const* arguments) {
  TensorView stream;
  if (eager.is_watched() || !view_tensor(arguments[0], stream)) return py::none();
  const py::object way = eager.find_way(stream, arguments[0], arguments[2], py::reinterpret_borrow<py::tuple>(arguments[kTensors]));
  const bool records = is_true(call(eager.records));
  // Whoever packs what is kept is to get what the operator keeps: checkpointing, for one, compares it with what the recomputation keeps,
  // which may be watched, or find its inputs laid out differently.
  if (way.is_none() || (records && !call(eager.hooks).is_none())) return py::none();
  const py::object results = call(PyTuple_GET_ITEM(way.ptr(), 0), arguments, kTensors);
  if (!PyTuple_Check(results.ptr())) return py::none();
  if (!records || !eager.may_need_gradients(arguments)) return checked(PyTuple_GetSlice(results.ptr(), 0, 3));
  std::array<PyObject*, kTensors + 2> remembered;
  std::copy_n(arguments, kTensors, remembered.begin());
  remembered[kTensors] = way.ptr();
  remembered[kTensors + 1] = results.ptr();
  return call(eager.remember, remembered.data(), remembered.size());
}

// The context of what `remember` is for autograd; what it saved, dy, dnormed, dgates. A gradient for each of `remember`'s arguments.
py::object differentiate(Eager& eager, PyObject* const* arguments) {
  if (is_true(call(eager.records)) || eager.is_watched()) return py::none();
  const auto [context, saved, dy, dnormed, dgates] = unpack<5>(arguments);
  const py::object way = attribute(context, eager.way), wanted = attribute(context, eager.needs_input_grad);
  const auto wants = [&](std::size_t input) { return PyTuple_GET_ITEM(wanted.ptr(), input) == Py_True; };
  // Without an incoming gradient there is none to return; without one through the norm, its parameters' are zeros. Not here.
  const bool through_norm = !dnormed.is_none(), nothing = !through_norm && dy.is_none() && dgates.is_none();
  const py::handle backward = PyTuple_GET_ITEM(way.ptr(), 1);
  if (backward.is_none() || nothing || (!through_norm && (wants(6) || wants(7)))) return py::none();

  py::tuple needs(kGradients);
  for (std::size_t i = 0; i < kGradients; ++i) needs[i] = py::bool_(wants(i + 1) || (i == 0 && wants(0)));
  std::array<PyObject*, 3 + kTensors + 1> given{dy.ptr(), dnormed.ptr(), dgates.ptr()};
  for (std::size_t i = 0; i < kTensors; ++i) given[3 + i] = PyTuple_GET_ITEM(saved.ptr(), i);
  given.back() = needs.ptr();
  const py::object gradients = call(backward, given.data(), given.size());
  if (!PyTuple_Check(gradients.ptr())) return py::none();
  py::tuple results(kTensors + 2);
  for (std::size_t i = 0; i < results.size(); ++i)  // the residual's is the stream's
    results[i] = i < kTensors && wants(i) ? py::handle(PyTuple_GET_ITEM(gradients.ptr(), i == 0 ? 0 : i - 1)) : py::handle(Py_None);
  return std::move(results);
}

py::object forget(Eager& eager, PyObject* const*) {
  eager.known.clear();
  return py::none();
}

}  // namespace

void define_eager(py::module_& module) {
  module.def(
      "eager",
      [](py::tuple watchers, py::object records, py::object hooks, py::object prefer, py::object find, py::object remember) {
        const py::capsule state = hold_state(std::unique_ptr<Eager>(new Eager{watchers, records, hooks, prefer, find, remember}));
        return py::make_tuple(Function<&steer, kTensors + 1>::make("steer", state),
                              Function<&differentiate, 5>::make("differentiate", state), Function<&forget, 0>::make("forget", state));
      },
      "The functions steer, differentiate and forget, each None for what is to go the long way.", py::arg("watchers"), py::arg("records"),
      py::arg("hooks"), py::arg("prefer"), py::arg("find"), py::arg("remember"));
}

}  // namespace steer
