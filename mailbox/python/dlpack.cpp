// DLPack, versions 0 and 1 (github.com/dmlc/dlpack, dlpack.h: the structures are its ABI), and __cuda_array_interface__ (version 3).
#include "tensor.hpp"

#include <numpy/ndarraytypes.h>

namespace sage_edge::mailbox::python {
namespace {

struct DLDevice {
  std::int32_t device_type, device_id;
};
struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  std::uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;
  DLTensor tensor;
};
constexpr std::uint64_t kReadOnly = 1;

DLDataType dl_type(std::uint8_t code) {
  const auto bits = static_cast<std::uint8_t>(item_bytes(code) * 8);
  const auto type = static_cast<DType>(code);
  if (type == DType::Bool) return {6, 8, 1};
  if (type <= DType::Int64) return {0, bits, 1};
  if (type <= DType::UInt64) return {1, bits, 1};
  if (type <= DType::Float64) return {2, bits, 1};
  if (type == DType::BFloat16) return {4, bits, 1};
  return {5, bits, 1};
}

template <class Managed>
struct Export {
  Managed managed;
  PyObject* owner;
  std::int64_t shape[kMaxAxes], strides[kMaxAxes];
};

template <class Managed>
void delete_export(Managed* managed) {
  auto* self = static_cast<Export<Managed>*>(managed->context);
  nb::gil_scoped_acquire gil;  // a consumer may let go of it in any thread
  Py_DECREF(self->owner);
  delete self;
}

template <class Managed>
void destroy_unused(PyObject* capsule, const char* name) {
  if (!PyCapsule_IsValid(capsule, name)) return;  // a consumer renamed it and took it over
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  managed->deleter(managed);
}

template <class Managed>
PyObject* export_as(const char* name, PyCapsule_Destructor destroy, nb::handle owner, const Descriptor& d, void* data, bool read_only) {
  auto* self = new Export<Managed>();
  self->owner = owner.inc_ref().ptr();
  const int ndim = d.ndim & 0x7F;
  std::int64_t step = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    self->shape[i] = d.extent[i];
    self->strides[i] = d.ndim & kStrided ? d.extent[kMaxStridedAxes + static_cast<std::uint32_t>(i)] : step;
    step *= self->shape[i];
  }
  self->managed.tensor = {data, {d.device_type, d.device}, ndim, dl_type(d.dtype), self->shape, self->strides, 0};
  self->managed.context = self;
  self->managed.deleter = delete_export<Managed>;
  if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) {
    self->managed.major = 1;
    self->managed.minor = 0;
    self->managed.flags = read_only ? kReadOnly : 0;
  }
  return PyCapsule_New(&self->managed, name, destroy);
}

}  // namespace

nb::object dlpack(nb::handle array, const Descriptor& d, void* data, bool read_only, nb::handle stream, nb::handle max_version,
                  nb::handle dl_device, nb::handle copy) {
  if (!stream.is_none()) {
    PyErr_SetString(PyExc_BufferError, "stream: None was expected for memory of the CPU");
    throw nb::python_error();
  }
  if (!dl_device.is_none() && !dl_device.equal(nb::make_tuple(int{d.device_type}, int{d.device}))) {
    PyErr_SetString(PyExc_BufferError, "dl_device: the tensor lies on another device; copy it there");
    throw nb::python_error();
  }
  if (!copy.is_none() && nb::cast<bool>(copy)) {
    PyErr_SetString(PyExc_BufferError, "copy: export is without a copy; use array.copy()");
    throw nb::python_error();
  }
  const bool versioned = !max_version.is_none() && nb::cast<int>(max_version[0]) >= 1;
  PyObject* capsule;
  if (versioned) {
    const auto destroy = [](PyObject* c) { destroy_unused<DLManagedTensorVersioned>(c, "dltensor_versioned"); };
    capsule = export_as<DLManagedTensorVersioned>("dltensor_versioned", destroy, array, d, data, read_only);
  } else {  // version 0 has no flag for it: who takes the tensor must not write
    const auto destroy = [](PyObject* c) { destroy_unused<DLManagedTensor>(c, "dltensor"); };
    capsule = export_as<DLManagedTensor>("dltensor", destroy, array, d, data, read_only);
  }
  if (!capsule) throw nb::python_error();
  return nb::steal(capsule);
}

nb::dict cuda_interface(const Descriptor& d, std::uint64_t address, bool read_only) {
  nb::dict result;
  result["shape"] = shape_of(d);
  result["typestr"] = dtype_object(d.dtype).attr("str");
  result["data"] = nb::make_tuple(address, read_only);
  result["version"] = 3;
  result["stream"] = nb::none();
  if (d.ndim & kStrided) {
    const int ndim = d.ndim & 0x7F;
    nb::object strides = nb::steal(PyTuple_New(ndim));
    for (int i = 0; i < ndim; ++i) {
      const std::uint64_t bytes = std::uint64_t{d.extent[kMaxStridedAxes + static_cast<std::uint32_t>(i)]} * item_bytes(d.dtype);
      PyTuple_SetItem(strides.ptr(), i, PyLong_FromUnsignedLongLong(bytes));
    }
    result["strides"] = strides;
  } else {
    result["strides"] = nb::none();
  }
  return result;
}

}  // namespace sage_edge::mailbox::python
