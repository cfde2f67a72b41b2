// Eager calls of the operator: from Python's arguments, and from autograd's, to a backend's direct way (`direct.h`).
//
// Who is watching, which way it is, what autograd has to know: asked in Python, out of cold caches, that takes longer than a short clip's
// frames do. Here, too, None is the answer to whatever asks for more than a look, and sends the call the long way.
#pragma once

#include <pybind11/pybind11.h>

namespace steer {

void define_eager(pybind11::module_& module);

}  // namespace steer
