#include "tensors.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/memory.h"

namespace py = pybind11;

namespace steer {

namespace {

// --- the standard's structs -------------------------------------------------------------------------------------------------------------

constexpr std::uint32_t kMajor = 1;
constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kFloat = 2, kBfloat = 4;

struct Version {
  std::uint32_t major, minor;
};

struct Device {
  std::int32_t type, id;
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
  int (*allocate)(Tensor*, ManagedTensor**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, ManagedTensor**);
  int (*managed_to_object)(ManagedTensor*, void**);
  int (*from_object)(void*, Tensor*);
  int (*current_stream)(std::int32_t, std::int32_t, void**);
};

const Exchange* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;

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
  cpu::Block block;
  std::vector<std::int64_t> shape, strides;
};

void bury(ManagedTensor* managed) {
  const std::unique_ptr<Owner> owner(static_cast<Owner*>(managed->context));
  cpu::give_back(owner->block);
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
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  exchange = table;
  return true;
}

bool view_tensor(py::handle object, TensorView& view) {
  const PyTypeObject* type = Py_TYPE(object.ptr());
  if (exchange == nullptr || (type != tensor_type && type != parameter_type)) return false;
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const auto negates = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), is_neg));
  Tensor tensor;
  if (!negates || exchange->from_object(object.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  view.data = static_cast<const char*>(tensor.data) + tensor.byte_offset;
  view.rank = tensor.rank;
  view.shape = tensor.shape;
  return negates.is(py::handle(Py_False)) && tensor.device.type == kCpu && tensor.data != nullptr &&
         element_to_dtype(tensor.element, view.dtype) && is_contiguous(tensor);
}

py::object make_tensor(DType dtype, const std::int64_t* shape, std::int32_t rank, bool fill, void*& data) {
  auto owner = std::make_unique<Owner>();
  owner->shape.assign(shape, shape + rank);
  owner->strides.resize(rank);
  std::int64_t count = 1;
  for (std::int32_t axis = rank - 1; axis >= 0; --axis) {
    owner->strides[axis] = count;
    count *= shape[axis];
  }
  const ElementType element = dtype_to_element(dtype);
  owner->block = cpu::take_block(count * element.bits / 8);
  data = owner->block.data;
  if (fill) std::memset(data, 0xFF, static_cast<std::size_t>(count * element.bits / 8));  // a NaN in every one of the dtypes
  const Tensor tensor{data, {kCpu, 0}, rank, element, owner->shape.data(), owner->strides.data(), 0};
  owner->managed = {{kMajor, 0}, owner.get(), bury, 0, tensor};
  void* object = nullptr;
  if (exchange->managed_to_object(&owner.release()->managed, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

}  // namespace steer
