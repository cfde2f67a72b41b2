// Functions for Python by CPython's own calling convention: pybind11's is slow, compared with a short call, when its code is not in a
// cache.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>

namespace steer {

template <auto body, Py_ssize_t count>
struct Function;

// `body(state, arguments)`, with `count` arguments by position, from a function to Python. It returns a new object, or throws.
template <typename State, pybind11::object (*body)(State&, PyObject* const*), Py_ssize_t count>
struct Function<body, count> {
  // The state is a capsule of `hold_state`; several functions may share it.
  static pybind11::object make(const char* name, const pybind11::capsule& state) {
    static PyMethodDef definition{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL, nullptr};
    return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&definition, state.ptr()));
  }

 private:
  static PyObject* call(PyObject* state, PyObject* const* arguments, Py_ssize_t given) {
    if (given != count) return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", count, given);
    try {
      return body(*static_cast<State*>(PyCapsule_GetPointer(state, nullptr)), arguments).release().ptr();
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

template <std::size_t count>
std::array<pybind11::handle, count> unpack(PyObject* const* arguments) {
  std::array<pybind11::handle, count> handles;
  std::copy_n(arguments, count, handles.begin());
  return handles;
}

template <typename State>
pybind11::capsule hold_state(std::unique_ptr<State> state) {
  return pybind11::capsule(state.release(), [](void* held) { delete static_cast<State*>(held); });
}

}  // namespace steer
