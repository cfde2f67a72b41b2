#include "tensors.h"

#include <algorithm>
#include <memory>
#include <new>

namespace py = pybind11;

namespace steer {

namespace {

// --- the standard's structs -------------------------------------------------------------------------------------------------------------

constexpr std::uint32_t kMajor = 1;
constexpr std::uint8_t kUnsigned = 1, kFloat = 2, kBfloat = 4;

struct Version {
  std::uint32_t major, minor;
};

struct ElementType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t rank;
  ElementType element;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null for a contiguous tensor
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  std::uint64_t flags;
  Tensor tensor;
};

struct Exchange {
  Version version;
  const void* older;
  int (*allocate)(Tensor*, ManagedTensor**, void* context, void (*fail)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void*, ManagedTensor**);
  int (*managed_to_object)(ManagedTensor*, void**);
  int (*from_object)(void*, Tensor*);
  int (*current_stream)(std::int32_t, std::int32_t, void**);
};

const Exchange* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
// Torch's: dtypes in the order of DType, and functions.
PyObject* dtypes[4];
PyObject *is_neg, *untyped_storage, *new_empty, *get_num_threads, *is_deterministic, *is_filling;

bool element_to_dtype(ElementType element, DType& dtype) {
  if (element.lanes != 1) return false;
  if (element.code == kBfloat && element.bits == 16)
    dtype = DType::kBFloat16;
  else if (element.code == kFloat && element.bits == 16)
    dtype = DType::kFloat16;
  else if (element.code == kFloat && element.bits == 32)
    dtype = DType::kFloat32;
  else if (element.code == kFloat && element.bits == 64)
    dtype = DType::kFloat64;
  else
    return false;
  return true;
}

ElementType dtype_to_element(DType dtype) {
  const std::uint8_t bits = dtype == DType::kFloat64 ? 64 : dtype == DType::kFloat32 ? 32 : 16;
  return {dtype == DType::kBFloat16 ? kBfloat : kFloat, bits, 1};
}

bool is_contiguous(const Tensor& tensor) {
  if (tensor.strides == nullptr) return true;
  std::int64_t expected = 1;
  for (std::int32_t axis = tensor.rank - 1; axis >= 0; --axis) {
    if (tensor.shape[axis] != 1 && tensor.strides[axis] != expected) return false;
    expected *= tensor.shape[axis];
  }
  return true;
}

// A tensor of ours, with its memory.
struct Owner {
  ManagedTensor managed;
  std::int64_t size;
  void (*free)(void*, std::int64_t);
  Shape shape, strides;

  Owner(const Shape& sizes, std::int64_t bytes, void (*take_back)(void*, std::int64_t))
      : size(bytes), free(take_back), shape(sizes), strides(sizes.size()) {
    std::int64_t count = 1;
    for (std::size_t axis = shape.size(); axis-- > 0; count *= shape[axis]) strides[axis] = count;
  }
};

void bury(ManagedTensor* managed) {
  const std::unique_ptr<Owner> owner(static_cast<Owner*>(managed->context));
  owner->free(managed->tensor.data, owner->size);
}

bool from_object(py::handle object, Tensor& tensor) {
  const PyTypeObject* type = Py_TYPE(object.ptr());
  if (exchange == nullptr || (type != tensor_type && type != parameter_type)) return false;
  if (exchange->from_object(object.ptr(), &tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

bool says_yes(PyObject* question) {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(question));
  if (!answer) throw py::error_already_set();
  return answer.is(py::handle(Py_True));
}

// The Python object of a tensor, which is handed over whatever happens; none where torch refuses, with nothing raised.
py::object to_object(ManagedTensor* managed) {
  void* object = nullptr;
  if (exchange->managed_to_object(managed, &object) == 0 && object != nullptr)
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  PyErr_Clear();
  return py::none();
}

// Whether there is memory where a tensor says that it is. One whose storage has been freed lies as far from address 0 as it lay in its
// storage: only low addresses, where hardly any memory is, have to be asked about.
bool has_memory(py::handle object, const void* data) {
  constexpr std::uintptr_t kLow = std::uintptr_t{1} << 38;  // no storage is so large
  if (reinterpret_cast<std::uintptr_t>(data) >= kLow) return true;
  const auto storage = py::reinterpret_steal<py::object>(PyObject_CallOneArg(untyped_storage, object.ptr()));
  const auto bytes = py::reinterpret_steal<py::object>(storage ? PyObject_CallMethod(storage.ptr(), "nbytes", nullptr) : nullptr);
  const bool some = bytes && PyObject_IsTrue(bytes.ptr()) == 1;
  PyErr_Clear();
  return some;
}

}  // namespace

bool TensorView::has_shape(std::initializer_list<std::int64_t> wanted) const {
  return rank == static_cast<std::int32_t>(wanted.size()) && std::equal(wanted.begin(), wanted.end(), shape);
}

std::int64_t TensorView::numel() const {
  std::int64_t count = 1;
  for (std::int32_t axis = 0; axis < rank; ++axis) count *= shape[axis];
  return count;
}

bool connect_tensors(py::handle tensor, py::handle parameter) {
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  const auto* table = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table->version.major != kMajor || table->from_object == nullptr) return false;
  if (exchange != nullptr) return true;
  const py::module_ torch = py::module_::import("torch");
  const auto keep = [](py::handle object, const char* name) { return py::object(object.attr(name)).release().ptr(); };
  std::size_t next = 0;
  for (const char* name : {"float32", "float16", "bfloat16", "float64"}) dtypes[next++] = keep(torch, name);
  is_neg = keep(tensor, "is_neg");
  untyped_storage = keep(tensor, "untyped_storage");
  new_empty = keep(tensor, "new_empty");
  get_num_threads = keep(torch, "get_num_threads");
  is_deterministic = keep(torch.attr("_C"), "_get_deterministic_algorithms");
  is_filling = keep(torch.attr("_C"), "_get_deterministic_fill_uninitialized_memory");
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  exchange = table;
  return true;
}

bool view_tensor(py::handle object, TensorView& view) {
  Tensor tensor;
  if (!from_object(object, tensor)) return false;
  const auto negates = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, object.ptr()));
  if (!negates) {
    PyErr_Clear();
    return false;
  }
  view.data = static_cast<const char*>(tensor.data) + tensor.byte_offset;
  view.device = tensor.device;
  view.rank = tensor.rank;
  view.shape = tensor.shape;
  return negates.is(py::handle(Py_False)) && tensor.data != nullptr && element_to_dtype(tensor.element, view.dtype) &&
         is_contiguous(tensor) && has_memory(object, view.data);
}

bool view_rows(py::handle object, std::int64_t& rows) {
  Tensor tensor;
  if (!from_object(object, tensor) || tensor.rank != 2) return false;
  rows = tensor.shape[0];
  return true;
}

py::object adopt_memory(DType dtype, const Shape& shape, void* data, std::int64_t size, void (*free)(void*, std::int64_t)) {
  Owner* owner = nullptr;
  try {
    owner = new Owner(shape, size, free);
  } catch (const std::bad_alloc&) {
    free(data, size);
    return py::none();
  }
  const auto rank = static_cast<std::int32_t>(shape.size());
  const Tensor tensor{data, Device{}, rank, dtype_to_element(dtype), owner->shape.data(), owner->strides.data(), 0};
  owner->managed = {{kMajor, 0}, owner, bury, 0, tensor};
  return to_object(&owner->managed);
}

py::object allocate_tensor(py::handle like, DType dtype, const Shape& shape, void*& data) {
  static PyObject* const names = Py_BuildValue("(s)", "dtype");
  py::tuple sizes(shape.size());
  for (std::size_t axis = 0; axis < shape.size(); ++axis) sizes[axis] = shape[axis];
  PyObject* const arguments[] = {like.ptr(), sizes.ptr(), dtypes[static_cast<int>(dtype)]};
  auto tensor = py::reinterpret_steal<py::object>(PyObject_Vectorcall(new_empty, arguments, 2, names));
  TensorView view;
  if (!tensor || !view_tensor(tensor, view)) {
    PyErr_Clear();
    return py::none();
  }
  data = const_cast<void*>(view.data);
  return tensor;
}

py::object allocate_bytes(std::int64_t bytes, Device device, void*& data) {
  Tensor prototype{nullptr, device, 1, {kUnsigned, 8, 1}, &bytes, nullptr, 0};
  ManagedTensor* managed = nullptr;
  if (exchange->allocate(&prototype, &managed, nullptr, [](void*, const char*, const char*) {}) != 0) {
    PyErr_Clear();
    return py::none();
  }
  data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
  return to_object(managed);
}

bool current_stream(Device device, void*& stream) {
  if (exchange->current_stream(device.type, device.index, &stream) == 0) return true;
  PyErr_Clear();
  return false;
}

int thread_count() {
  const auto count = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(get_num_threads));
  const long threads = count ? PyLong_AsLong(count.ptr()) : -1;
  if (threads < 0) throw py::error_already_set();
  return static_cast<int>(threads);
}

bool fills_memory() { return says_yes(is_deterministic) && says_yes(is_filling); }

std::int64_t bytes_of(DType dtype) { return dtype_to_element(dtype).bits / 8; }

}  // namespace steer
