// Slots as NumPy arrays and DLPack capsules, and how we know when the last of them is gone.
#pragma once

#define PY_ARRAY_UNIQUE_SYMBOL sage_edge_mailbox_numpy
#ifndef SAGE_EDGE_IMPORTS_NUMPY  // tensor.cpp alone holds NumPy's function table; from 2.5 on, other headers declare it too
#define NO_IMPORT_ARRAY
#endif
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION

#include "support.hpp"

namespace sage_edge::mailbox::python {

class FocusHandle;

void load_numpy();
int dtype_code(nb::handle dtype);         // of anything NumPy takes for a dtype; 0 when the layout has no code for it
nb::object dtype_object(std::uint8_t code);  // numpy.dtype

// A *hold* is the base object of a slot's arrays: a capsule. While only the Loan or Item and its own array refer to it, nobody
// else looks at the slot. When views outlive their Loan or Item, the hold takes over the duty to give the slot back.
struct Hold {
  enum class Duty { None, Release, Cancel } duty = Duty::None;
  FocusHandle* port = nullptr;
  PyObject* port_object = nullptr;  // owned while views outlive their Loan or Item: keeps the mapping
  std::uint32_t slot = 0;
  std::uint64_t word = 0;
};
PyObject* new_hold();
Hold& hold_of(PyObject* capsule);

// A new array over `data`; owns a reference to `hold`. Null with a Python error.
PyObject* new_array(const Descriptor& descriptor, void* data, PyObject* hold, bool writable);
// Is it still just what `new_array` would make? (Its owner may have changed shape, dtype or flags in place.)
bool is_array_of(PyObject* array, const Descriptor& descriptor, const void* data, bool writable);
PyObject* new_record_array(PyObject* dtype, void* data, PyObject* owner);
void set_writable(PyObject* array, bool writable);
nb::tuple shape_of(const Descriptor& descriptor);

// `view` as what `send` hands over: shape and strides into `descriptor`. Raises InputError when it does not begin at `data`,
// has another dtype, or strides that a descriptor cannot hold.
void describe_view(nb::handle view, const void* data, std::uint64_t bytes, Descriptor& descriptor, const std::string& port);

// DLPack (dlpack.cpp): a capsule over the array's memory, which keeps the array alive.
nb::object dlpack(nb::handle array, const Descriptor& descriptor, void* data, bool read_only, nb::handle stream, nb::handle max_version,
                  nb::handle dl_device, nb::handle copy);
nb::dict cuda_interface(const Descriptor& descriptor, std::uint64_t address, bool read_only);

}  // namespace sage_edge::mailbox::python
