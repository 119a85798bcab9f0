#include "focus.hpp"

#include <cmath>
#include <cstring>

#include <numpy/ndarraytypes.h>

namespace sage_edge::mailbox::python {
namespace {

using PortObject = nb::handle_t<FocusHandle>;

FocusHandle& handle_of(PortObject self) { return *nb::inst_ptr<FocusHandle>(self); }

void warn_views(const char* text) {
  if (PyErr_WarnEx(errors.views_alive, text, 1) != 0) throw nb::python_error();
}

}  // namespace

// --- the port

FocusHandle::FocusHandle(nb::dict arguments) {
  const Opening o = opening_of(arguments);
  name = o.name;
  region_ = open_region(o);
  nb::handle dtype = arguments["dtype"], shape = arguments["shape"];
  if (!dtype.is_none()) spec_.dtype = static_cast<std::uint8_t>(dtype_code(dtype));
  if (!shape.is_none()) {
    spec_shaped_ = true;
    for (nb::handle n : shape) spec_.extent[spec_.ndim++] = n.is_none() ? 0 : nb::cast<std::uint32_t>(n);
  }
  shape_fixed_ = spec_shaped_;
  for (int i = 0; i < spec_.ndim; ++i) shape_fixed_ = shape_fixed_ && spec_.extent[i];
  spec_.device_type = device_type;
  kept_.resize(o.geometry.slots);
  const Status s = without_gil([&] { return port.open(*region_, o.label.c_str()); });
  if (s != Status::Ok) raise_status(s, name);
}

FocusHandle::~FocusHandle() {
  if (!closed_) shut();
  Py_XDECREF(last_dtype_);
}

void FocusHandle::close() {
  closed_ = true;
  if (pins_ == 0) shut();
}

void FocusHandle::shut() {
  closed_ = true;
  for (ArrayPair& pair : kept_) pair.clear();
  if (region_) port.leave();
  region_.reset();
}

ArrayPair FocusHandle::take_arrays(std::uint32_t slot, const Descriptor& descriptor, bool writable) {
  ArrayPair pair = kept_[slot];
  kept_[slot] = {};
  if (pair.array && is_array_of(pair.array, descriptor, payload(slot), writable)) return pair;
  Py_CLEAR(pair.array);
  if (!pair.hold) pair.hold = new_hold();
  if (pair.hold) pair.array = new_array(descriptor, payload(slot), pair.hold, writable);
  if (!pair.array) {
    pair.clear();
    throw nb::python_error();
  }
  return pair;
}

void FocusHandle::keep_arrays(std::uint32_t slot, const ArrayPair& pair) {
  kept_[slot].clear();
  kept_[slot] = pair;
}

const char* FocusHandle::misfit(const Descriptor& d) const {
  if (spec_.dtype && d.dtype != spec_.dtype) return "dtype";
  if (!spec_shaped_) return nullptr;
  if ((d.ndim & 0x7F) != spec_.ndim) return "shape";
  for (int i = 0; i < spec_.ndim; ++i) {
    if (spec_.extent[i] && spec_.extent[i] != d.extent[i]) return "shape";
  }
  return nullptr;
}

void FocusHandle::fill_shape(nb::handle shape, Descriptor& d) const {
  const auto axis = [&](nb::handle value) {
    const long long n = PyLong_AsLongLong(value.ptr());
    if (n == -1 && PyErr_Occurred()) throw nb::python_error();
    if (n < 0 || n > 0xFFFFFFFFll) raise(errors.input, "port %s: shape: expected axes of 0 to 2^32 - 1, found %lld", name.c_str(), n);
    return static_cast<std::uint32_t>(n);
  };
  d.ndim = 0;
  if (PyLong_Check(shape.ptr())) {
    d.extent[d.ndim++] = axis(shape);
    return;
  }
  for (nb::handle n : shape) {
    if (d.ndim == kMaxAxes) raise(errors.input, "port %s: shape: at most %u axes", name.c_str(), kMaxAxes);
    d.extent[d.ndim++] = axis(n);
  }
}

nb::object FocusHandle::loan(nb::handle self, nb::handle shape, nb::handle dtype, double trust, nb::handle timeout) {
  require_open();
  Descriptor d = spec_;
  d.device_type = device_type;
  d.device = device;
  if (!dtype.is_none()) {
    if (dtype.ptr() != last_dtype_) {  // nearly always the same object again
      const int code = dtype_code(dtype);
      if (!code) raise(errors.input, "port %s: dtype: bool, (u)int8-64, float16-64, complex64 or complex128 was expected", name.c_str());
      Py_XDECREF(last_dtype_);
      last_dtype_ = dtype.inc_ref().ptr();
      last_code_ = code;
    }
    d.dtype = static_cast<std::uint8_t>(last_code_);
  }
  if (!shape.is_none()) fill_shape(shape, d);
  if (!d.dtype) raise(errors.input, "port %s: loan: the port takes any dtype, so say which", name.c_str());
  if (shape.is_none() && !shape_fixed_) raise(errors.input, "port %s: loan: the port takes more than one shape, so say which", name.c_str());
  if (!dtype.is_none() || !shape.is_none()) {
    check_own(d, "loan");
    d.id = 0;
    if (check(d, 0, 0, port.region().geometry().slot_bytes)) {
      raise(errors.input, "port %s: loan: the tensor is larger than a slot (%llu bytes); raise max_bytes in ports.yaml", name.c_str(),
            static_cast<unsigned long long>(port.region().geometry().slot_bytes));
    }
  }
  d.trust = trust_code(trust);
  FocusPort::Loan out{};
  Status status = port.try_loan(d.trust, out);
  if (status == Status::Full || status == Status::Capped) {
    if (port.region().geometry().policy == Policy::Block) {
      const auto attempt = [&] {
        if (closed_) return true;
        status = port.try_loan(d.trust, out);
        return status != Status::Full && status != Status::Capped;
      };
      pin();
      try {
        until(deadline_of(timeout), attempt, [&](std::uint64_t deadline) { return port.wait_space(deadline, spin_ns); });
      } catch (...) {
        unpin();
        throw;
      }
      unpin();
      require_open();
    }
  }
  if (status != Status::Ok) {
    if (status == Status::Full || status == Status::Capped || status == Status::LessTrusted) port.count(Counter::Refused);
    raise_status(status, name);
  }
  d.id = out.slot;
  nb::object loan = nb::inst_alloc(nb::type<Loan>());
  new (nb::inst_ptr<Loan>(loan)) Loan(self, *this, out, d);
  nb::inst_mark_ready(loan);
  return loan;
}

void FocusHandle::check_item(const Descriptor& d) const {
  if (const char* wrong = misfit(d)) raise_status(Status::Corrupt, name, wrong);
}

void FocusHandle::check_own(const Descriptor& d, const char* doing) const {
  if (const char* wrong = misfit(d)) raise(errors.input, "port %s: %s: %s is not what the port takes (its spec says which)", name.c_str(), doing, wrong);
}

bool FocusHandle::try_receive(nb::handle self, nb::object& out) {
  FocusPort::Received r;
  const Status status = port.try_receive(r);
  if (status == Status::Empty) return false;
  if (status != Status::Ok) raise_status(status, name, r.wrong);
  out = nb::inst_alloc(nb::type<Item>());
  new (nb::inst_ptr<Item>(out)) Item(self, *this, r);
  nb::inst_mark_ready(out);
  check_item(r.descriptor);  // on error the item dies, and its slot is free again
  return true;
}

nb::object FocusHandle::receive(nb::handle self, nb::handle timeout) {
  require_open();
  nb::object out = nb::none();
  if (try_receive(self, out)) return out;
  const std::uint64_t deadline = deadline_of(timeout);
  if (deadline == 0 || (brief_spin(spin_ns, [&] { return port.items_ready(); }) && try_receive(self, out))) return out;
  // Another thread may close the port while we wait without the GIL: the mapping must stay until we are back.
  pin();
  const auto attempt = [&] { return closed_ || try_receive(self, out); };
  try {
    until(deadline, attempt, [&](std::uint64_t d) { return port.wait_items(d, spin_ns); });
  } catch (...) {
    unpin();
    throw;
  }
  const bool was_closed = closed_;
  unpin();
  if (was_closed && out.is_none()) raise(errors.closed, "port %s: was closed while waiting", name.c_str());
  return out;
}

nb::object FocusHandle::claim(nb::handle self, nb::bytes descriptor) {
  require_open();
  Descriptor d;
  if (descriptor.size() != sizeof d) raise(errors.input, "port %s: claim: a descriptor of 64 bytes was expected, found %zu", name.c_str(), descriptor.size());
  std::memcpy(&d, descriptor.data(), sizeof d);
  FocusPort::Received r;
  const Status status = port.claim(d, r);
  if (status != Status::Ok) raise_status(status, name, r.wrong);
  nb::object out = nb::inst_alloc(nb::type<Item>());
  new (nb::inst_ptr<Item>(out)) Item(self, *this, r);
  nb::inst_mark_ready(out);
  check_item(r.descriptor);
  return out;
}

// --- what loan and item share

FocusHandle& SlotHandle::require_active(const char* what) const {
  if (!port_) raise(errors.closed, "%s: the slot was given away (sent, cancelled or released); copy what must stay", what);
  return *port_;
}

nb::object SlotHandle::array(bool writable) {
  FocusHandle& port = require_active("array");
  if (!arrays_.array) arrays_ = port.take_arrays(slot, descriptor, writable);
  return nb::borrow(arrays_.array);
}

nb::object SlotHandle::host_array(bool writable) {
  if (require_active("array").device_type == kDeviceMemory) {
    raise(errors.input, "port %s: the tensor lies in the memory of a device, which the CPU cannot read; use __dlpack__ or "
          "__cuda_array_interface__", port_->name.c_str());
  }
  return array(writable);
}

nb::object SlotHandle::dlpack(bool writable, nb::handle stream, nb::handle max_version, nb::handle dl_device, nb::handle copy) {
  FocusHandle& port = require_active("__dlpack__");
  return python::dlpack(array(writable), descriptor, port.payload(slot), !writable, stream, max_version, dl_device, copy);
}

nb::dict SlotHandle::cuda_interface(bool writable) {
  FocusHandle& port = require_active("__cuda_array_interface__");
  const std::uint64_t address = port.device_address(slot);
  if (!address) {
    PyErr_Format(PyExc_AttributeError, "port %s: no GPU sees this memory (memory kind shm)", port.name.c_str());
    throw nb::python_error();
  }
  return python::cuda_interface(descriptor, address, !writable);
}

bool SlotHandle::views_alive() const { return arrays_.array && (Py_REFCNT(arrays_.array) > 1 || Py_REFCNT(arrays_.hold) > 2); }

bool SlotHandle::end(Hold::Duty duty) {
  FocusHandle& port = *port_;
  PyObject* port_object = port_object_;
  port_ = nullptr;
  port_object_ = nullptr;
  const bool lingering = views_alive();
  if (lingering) {
    Hold& hold = hold_of(arrays_.hold);
    hold.duty = duty;
    hold.port = &port;
    hold.port_object = port_object;  // with our pin
    hold.slot = slot;
    hold.word = word_;
    arrays_.clear();
    return true;
  }
  if (arrays_.array) port.keep_arrays(slot, arrays_);
  arrays_ = {};
  if (duty != Hold::Duty::None) port.give_back(slot, word_, duty == Hold::Duty::Release);
  port.unpin();
  Py_DECREF(port_object);
  return false;
}

// --- loan

std::uint64_t Loan::send(nb::handle view, std::uint32_t tag, nb::handle trust, nb::handle captured_ns, nb::handle ttl_ms, std::uint16_t event) {
  FocusHandle& port = require_active("send");
  Descriptor d = descriptor;
  d.tag = tag;
  d.event = event;
  if (!trust.is_none()) d.trust = trust_code(nb::cast<double>(trust));
  d.captured_ns = captured_ns.is_none() ? 0 : nb::cast<std::uint64_t>(captured_ns);
  d.ttl_us = ttl_code(ttl_ms, port.port.region().geometry().ttl_us);
  if (!view.is_none()) {
    describe_view(view, port.payload(slot), port.port.region().geometry().slot_bytes, d, port.name);
    port.check_own(d, "send");
    set_writable(view.ptr(), false);
  }
  const bool referenced = views_alive();
  if (referenced) {
    set_writable(arrays_.array, false);
    if (view.is_none()) {
      try {
        warn_views("send: the loan's array is still referenced; it is read-only now, but a slice taken before would write into what the receiver sees");
      } catch (...) {
        set_writable(arrays_.array, true);  // the warning is an error here: nothing is sent
        throw;
      }
    }
  }
  const char* wrong = nullptr;
  const Status status = port.port.send({slot, word_}, d, wrong);
  if (status != Status::Ok) raise_status(status, port.name, wrong);
  descriptor = d;
  end(Hold::Duty::None);
  return d.id >> 16;
}

void Loan::cancel() {
  if (!active()) return;
  if (end(Hold::Duty::Cancel)) warn_views("cancel: the loan's array is still referenced; the slot comes back when the last reference is gone");
}

// --- item

bool Item::release() {
  if (!active()) return true;
  if (!end(Hold::Duty::Release)) return true;
  warn_views("release: the item's array is still referenced; the slot comes back when the last reference is gone");
  return false;
}

std::uint16_t trust_code(double trust) {
  if (!(trust >= 0 && trust <= 1)) raise(errors.input, "trust: expected 0 to 1, found %g", trust);
  return static_cast<std::uint16_t>(std::lround(trust * 65535));
}

std::uint32_t ttl_code(nb::handle milliseconds, std::uint32_t fallback) {
  if (milliseconds.is_none()) return fallback;
  const double us = nb::cast<double>(milliseconds) * 1000;
  if (us == 0) return 0;
  if (!(us >= 1 && us <= 4294967295.0)) raise(errors.input, "ttl_ms: expected 0 (for ever) or 0.001 to 4294967, found %g", us / 1000);
  return static_cast<std::uint32_t>(std::lround(us));
}

// --- names for Python

void bind_focus(nb::module_& m) {
  using nb::arg;
  const auto none = nb::none();
  nb::class_<Loan>(m, "Loan")
      .def_prop_ro("array", [](Loan& l) { return l.host_array(true); })
      .def("send", &Loan::send, arg("view") = none, nb::kw_only(), arg("tag") = 0, arg("trust") = none, arg("captured_ns") = none,
           arg("ttl_ms") = none, arg("event") = 0)
      .def("cancel", &Loan::cancel)
      .def_ro("slot", &Loan::slot)
      .def_prop_ro("generation", &Loan::generation)
      .def_prop_ro("shape", [](Loan& l) { return shape_of(l.descriptor); })
      .def_prop_ro("dtype", [](Loan& l) { return dtype_object(l.descriptor.dtype); })
      .def("__enter__", [](nb::handle self) { return nb::borrow(self); })
      .def("__exit__", [](Loan& l, nb::handle, nb::handle, nb::handle) { l.cancel(); }, arg().none(), arg().none(), arg().none())
      .def("__dlpack__", [](Loan& l, nb::handle s, nb::handle v, nb::handle d, nb::handle c) { return l.dlpack(true, s, v, d, c); },
           nb::kw_only(), arg("stream") = none, arg("max_version") = none, arg("dl_device") = none, arg("copy") = none)
      .def("__dlpack_device__", [](Loan& l) { return nb::make_tuple(int{l.descriptor.device_type}, int{l.descriptor.device}); })
      .def_prop_ro("__cuda_array_interface__", [](Loan& l) { return l.cuda_interface(true); });
  nb::class_<Item>(m, "Item")
      .def_prop_ro("array", [](Item& i) { return i.host_array(false); })
      .def("release", &Item::release)
      .def_ro("slot", &Item::slot)
      .def_ro("producer", &Item::producer)
      .def_ro("sent_ns", &Item::sent_ns)
      .def_prop_ro("generation", &Item::generation)
      .def_prop_ro("captured_ns", [](Item& i) { return i.descriptor.captured_ns; })
      .def_prop_ro("tag", [](Item& i) { return i.descriptor.tag; })
      .def_prop_ro("event", [](Item& i) { return i.descriptor.event; })
      .def_prop_ro("trust", [](Item& i) { return i.descriptor.trust / 65535.0; })
      .def_prop_ro("ttl_ms", [](Item& i) { return i.descriptor.ttl_us / 1000.0; })
      .def_prop_ro("descriptor", [](Item& i) { return nb::bytes(&i.descriptor, sizeof i.descriptor); })
      .def_prop_ro("shape", [](Item& i) { return shape_of(i.descriptor); })
      .def_prop_ro("dtype", [](Item& i) { return dtype_object(i.descriptor.dtype); })
      .def("__enter__", [](nb::handle self) { return nb::borrow(self); })
      .def("__exit__", [](Item& i, nb::handle, nb::handle, nb::handle) { i.release(); }, arg().none(), arg().none(), arg().none())
      .def("__dlpack__", [](Item& i, nb::handle s, nb::handle v, nb::handle d, nb::handle c) { return i.dlpack(false, s, v, d, c); },
           nb::kw_only(), arg("stream") = none, arg("max_version") = none, arg("dl_device") = none, arg("copy") = none)
      .def("__dlpack_device__", [](Item& i) { return nb::make_tuple(int{i.descriptor.device_type}, int{i.descriptor.device}); })
      .def_prop_ro("__cuda_array_interface__", [](Item& i) { return i.cuda_interface(false); });
  nb::class_<FocusHandle>(m, "FocusPort")
      .def(nb::init<nb::dict>())
      .def("loan", [](PortObject self, nb::handle shape, nb::handle dtype, double trust, nb::handle timeout) {
             return handle_of(self).loan(self, shape, dtype, trust, timeout);
           }, arg("shape") = none, arg("dtype") = none, nb::kw_only(), arg("trust") = 1.0, arg("timeout") = none)
      .def("receive", [](PortObject self, nb::handle timeout) { return handle_of(self).receive(self, timeout); },
           arg("timeout") = none)
      .def("claim", [](PortObject self, nb::bytes descriptor) { return handle_of(self).claim(self, descriptor); },
           arg("descriptor"))
      .def("close", &FocusHandle::close)
      .def_prop_ro("closed", &FocusHandle::closed)
      .def_ro("name", &FocusHandle::name)
      .def_rw("device_base", &FocusHandle::device_base)
      .def_prop_rw("spin_us", [](FocusHandle& h) { return static_cast<double>(h.spin_ns) / 1000; },
                   [](FocusHandle& h, double us) { h.spin_ns = spin_of(us); })
      .def("_pending", [](FocusHandle& h, bool space) { h.require_open(); return space ? h.port.space_ready() : h.port.items_ready(); })
      .def("_open_fifo", [](FocusHandle& h) { h.require_open(); return fifo_of(h.port); })
      .def("_arm_fifo", [](FocusHandle& h, bool space) { h.require_open(); h.port.arm_fifo(space); });
}

}  // namespace sage_edge::mailbox::python
