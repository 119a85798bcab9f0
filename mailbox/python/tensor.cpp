#define SAGE_EDGE_IMPORTS_NUMPY
#include "tensor.hpp"

#include <cstring>

#include <numpy/arrayobject.h>

#include "focus.hpp"

namespace sage_edge::mailbox::python {
namespace {

constexpr int kTypes[] = {0,         NPY_BOOL,   NPY_INT8,  NPY_INT16,   NPY_INT32,   NPY_INT64,     NPY_UINT8,    NPY_UINT16,
                          NPY_UINT32, NPY_UINT64, NPY_HALF, NPY_FLOAT32, NPY_FLOAT64, NPY_COMPLEX64, NPY_COMPLEX128};
constexpr std::uint8_t kCodes = sizeof kTypes / sizeof *kTypes;
PyArray_Descr* builtin[kCodes];  // NumPy's own, one for each type

int import_numpy() {
  import_array1(-1);
  return 0;
}

void destroy_hold(PyObject* capsule) {
  auto* hold = static_cast<Hold*>(PyCapsule_GetPointer(capsule, nullptr));
  if (!hold) return;
  if (hold->port_object) {
    if (hold->duty != Hold::Duty::None) hold->port->give_back(hold->slot, hold->word, hold->duty == Hold::Duty::Release);
    hold->port->unpin();
    Py_DECREF(hold->port_object);
  }
  delete hold;
}

}  // namespace

void load_numpy() {
  if (import_numpy() != 0) throw nb::python_error();
  for (int code = 1; code < kCodes; ++code) builtin[code] = PyArray_DescrFromType(kTypes[code]);
}

int dtype_code(nb::handle dtype) {
  PyArray_Descr* descr = nullptr;
  if (!PyArray_DescrConverter(dtype.ptr(), &descr)) throw nb::python_error();
  const nb::object owner = nb::steal(reinterpret_cast<PyObject*>(descr));
  if (descr->byteorder == '>') return 0;
  for (int code = 1; code < kCodes; ++code) {
    // int64 may be `long` or `long long`: two numbers for one type.
    if (descr->type_num == kTypes[code] || PyArray_EquivTypenums(descr->type_num, kTypes[code])) return code;
  }
  return 0;
}

nb::object dtype_object(std::uint8_t code) {
  if (code == 0 || code >= kCodes) raise(errors.input, "dtype code %u has no NumPy dtype; use __dlpack__", code);
  return nb::steal(reinterpret_cast<PyObject*>(PyArray_DescrFromType(kTypes[code])));
}

PyObject* new_hold() { return PyCapsule_New(new Hold, nullptr, destroy_hold); }

Hold& hold_of(PyObject* capsule) { return *static_cast<Hold*>(PyCapsule_GetPointer(capsule, nullptr)); }

PyObject* new_array(const Descriptor& d, void* data, PyObject* hold, bool writable) {
  if (d.dtype >= kCodes) {
    PyErr_Format(errors.input, "dtype code %d has no NumPy dtype; use __dlpack__", d.dtype);
    return nullptr;
  }
  npy_intp shape[kMaxAxes], strides[kMaxAxes];
  const int ndim = d.ndim & 0x7F;
  const bool strided = d.ndim & kStrided;
  for (int i = 0; i < ndim; ++i) {
    shape[i] = d.extent[i];
    if (strided) strides[i] = static_cast<npy_intp>(d.extent[kMaxStridedAxes + i]) * static_cast<npy_intp>(item_bytes(d.dtype));
  }
  PyObject* array = PyArray_NewFromDescr(&PyArray_Type, PyArray_DescrFromType(kTypes[d.dtype]), ndim, shape,
                                         strided ? strides : nullptr, data, writable ? NPY_ARRAY_WRITEABLE : 0, nullptr);
  if (!array) return nullptr;
  Py_INCREF(hold);
  if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(array), hold) != 0) {
    Py_DECREF(array);
    return nullptr;
  }
  return array;
}

bool is_array_of(PyObject* array, const Descriptor& d, const void* data, bool writable) {
  auto* a = reinterpret_cast<PyArrayObject*>(array);
  const int flags = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | (writable ? NPY_ARRAY_WRITEABLE : 0);
  const int relevant = flags | NPY_ARRAY_WRITEABLE | NPY_ARRAY_OWNDATA | NPY_ARRAY_WRITEBACKIFCOPY;
  if (d.ndim & kStrided || d.dtype >= kCodes || PyArray_DATA(a) != data || PyArray_NDIM(a) != d.ndim ||
      (PyArray_FLAGS(a) & relevant) != flags || PyArray_DESCR(a) != builtin[d.dtype]) {
    return false;
  }
  for (int i = 0; i < d.ndim; ++i) {
    if (PyArray_DIM(a, i) != static_cast<npy_intp>(d.extent[i])) return false;
  }
  return true;
}

PyObject* new_record_array(PyObject* dtype, void* data, PyObject* owner) {
  Py_INCREF(dtype);
  PyObject* array = PyArray_NewFromDescr(&PyArray_Type, reinterpret_cast<PyArray_Descr*>(dtype), 0, nullptr, nullptr, data,
                                         NPY_ARRAY_WRITEABLE, nullptr);
  if (!array) return nullptr;
  Py_INCREF(owner);
  if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(array), owner) != 0) {
    Py_DECREF(array);
    return nullptr;
  }
  return array;
}

void set_writable(PyObject* array, bool writable) {
  auto* a = reinterpret_cast<PyArrayObject*>(array);
  writable ? PyArray_ENABLEFLAGS(a, NPY_ARRAY_WRITEABLE) : PyArray_CLEARFLAGS(a, NPY_ARRAY_WRITEABLE);
}

nb::tuple shape_of(const Descriptor& d) {
  const int ndim = d.ndim & 0x7F;
  nb::object shape = nb::steal(PyTuple_New(ndim));
  for (int i = 0; i < ndim; ++i) PyTuple_SetItem(shape.ptr(), i, PyLong_FromUnsignedLong(d.extent[i]));
  return nb::borrow<nb::tuple>(shape);
}

void describe_view(nb::handle view, const void* data, std::uint64_t bytes, Descriptor& d, const std::string& port) {
  const char* p = port.c_str();
  if (!PyArray_Check(view.ptr())) raise(errors.input, "port %s: send: a view of the loan's array was expected", p);
  auto* a = reinterpret_cast<PyArrayObject*>(view.ptr());
  if (PyArray_DATA(a) != data) raise(errors.input, "port %s: send: the view must begin at the first element of the loan's array", p);
  const int code = dtype_code(nb::borrow(reinterpret_cast<PyObject*>(PyArray_DESCR(a))));
  if (code != d.dtype) raise(errors.input, "port %s: send: the view has another dtype than the loan", p);
  const int ndim = PyArray_NDIM(a);
  const bool contiguous = PyArray_IS_C_CONTIGUOUS(a);
  const int most = static_cast<int>(contiguous ? kMaxAxes : kMaxStridedAxes);
  if (ndim > most) raise(errors.input, "port %s: send: a %s view has at most %d axes, found %d", p, contiguous ? "contiguous" : "strided", most, ndim);
  const npy_intp item = static_cast<npy_intp>(item_bytes(d.dtype));
  std::memset(d.extent, 0, sizeof d.extent);
  d.ndim = static_cast<std::uint8_t>(ndim | (contiguous ? 0 : kStrided));
  for (int i = 0; i < ndim; ++i) {
    const npy_intp n = PyArray_DIM(a, i), step = PyArray_STRIDE(a, i);
    if (n > 0xFFFFFFFFll) raise(errors.input, "port %s: send: axis %d has more than 2^32 - 1 elements", p, i);
    d.extent[i] = static_cast<std::uint32_t>(n);
    if (contiguous) continue;
    if (step < 0 || step % item || step / item > 0xFFFFFFFFll) {
      raise(errors.input, "port %s: send: axis %d has a stride of %lld bytes; whole elements, forwards, were expected", p, i, static_cast<long long>(step));
    }
    d.extent[kMaxStridedAxes + static_cast<std::uint32_t>(i)] = static_cast<std::uint32_t>(step / item);
  }
  if (const char* wrong = check(d, static_cast<std::uint32_t>(d.id & 0xFFFF), d.id >> 16, bytes)) {
    raise(errors.input, "port %s: send: the view's %s leaves the slot", p, wrong);
  }
}

}  // namespace sage_edge::mailbox::python
