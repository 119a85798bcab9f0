// The broadcast port as Python sees it: BroadcastPort, Record.
#include "broadcast.hpp"

#include <cstring>

#include "tensor.hpp"

namespace sage_edge::mailbox::python {
namespace {

nb::object array_of(nb::handle_t<Record> self) {
  Record& r = *nb::inst_ptr<Record>(self);
  PyObject* array = new_record_array(r.dtype.ptr(), r.received.words, self.ptr());
  if (!array) throw nb::python_error();
  return nb::steal(array);
}

}  // namespace

BroadcastHandle::BroadcastHandle(nb::dict arguments) {
  const Opening o = opening_of(arguments);
  name = o.name;
  dtype = nb::borrow(arguments["dtype"]);
  if (nb::cast<std::uint64_t>(dtype.attr("itemsize")) != o.geometry.record_bytes) {
    raise(errors.input, "port %s: the record's dtype does not have record_bytes bytes", name.c_str());
  }
  region_ = open_region(o);
  const Status s = without_gil([&] { return port.open(*region_, o.label.c_str()); });
  if (s != Status::Ok) raise_status(s, name);
}

BroadcastHandle::~BroadcastHandle() { shut(); }

void BroadcastHandle::close() {
  closed_ = true;
  if (waiting_ == 0) shut();
}

void BroadcastHandle::shut() {
  closed_ = true;
  if (region_) port.leave();
  region_.reset();
}

std::uint64_t BroadcastHandle::send(nb::handle record) {
  require_open();
  Py_buffer view;
  if (PyObject_GetBuffer(record.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
  const std::uint32_t bytes = port.region().geometry().record_bytes;
  std::uint64_t number = 0;
  Status status = Status::Ok;
  const Py_ssize_t found = view.len;
  if (found == static_cast<Py_ssize_t>(bytes)) status = port.send(view.buf, number);
  PyBuffer_Release(&view);
  if (found != static_cast<Py_ssize_t>(bytes)) {
    raise(errors.input, "port %s: send: a record of %u bytes was expected (port.record_dtype), found %zd", name.c_str(), bytes, found);
  }
  if (status != Status::Ok) raise_status(status, name);
  return number;
}

nb::object BroadcastHandle::record(const BroadcastPort::Received& received) {
  nb::object out = nb::inst_alloc(nb::type<Record>());
  new (nb::inst_ptr<Record>(out)) Record{received, dtype, port.region().geometry().record_bytes};
  nb::inst_mark_ready(out);
  lost += received.lost;
  return out;
}

bool BroadcastHandle::try_receive(nb::object& out) {
  BroadcastPort::Received r;
  const Status status = port.try_receive(r);
  if (status == Status::Empty) return false;
  if (status != Status::Ok) raise_status(status, name, "a ring's head");
  out = record(r);
  return true;
}

nb::object BroadcastHandle::receive(nb::handle timeout) {
  require_open();
  nb::object out = nb::none();
  if (try_receive(out)) return out;
  const std::uint64_t deadline = deadline_of(timeout);
  if (deadline == 0 || (brief_spin(spin_ns, [&] { return port.items_ready(); }) && try_receive(out))) return out;
  ++waiting_;  // another thread may close the port meanwhile: the mapping stays until we are back
  const auto attempt = [&] { return closed_ || try_receive(out); };
  try {
    until(deadline, attempt, [&](std::uint64_t d) { return port.wait_items(d, spin_ns); });
  } catch (...) {
    back();
    throw;
  }
  const bool was_closed = closed_;
  back();
  if (was_closed && out.is_none()) raise(errors.closed, "port %s: was closed while waiting", name.c_str());
  return out;
}

nb::object BroadcastHandle::latest() {
  require_open();
  BroadcastPort::Received r;
  const Status status = port.latest(r);
  if (status == Status::Empty) return nb::none();
  if (status != Status::Ok) raise_status(status, name);
  return record(r);
}

void bind_broadcast(nb::module_& m) {
  using nb::arg;
  nb::class_<Record>(m, "Record")
      .def_prop_ro("sent_ns", [](Record& r) { return r.received.sent_ns; })
      .def_prop_ro("producer", [](Record& r) { return r.received.ring; })
      .def_prop_ro("sequence", [](Record& r) { return r.received.number; })
      .def_prop_ro("lost", [](Record& r) { return r.received.lost; })
      .def_prop_ro("data", [](Record& r) { return nb::bytes(r.received.words, r.bytes); })
      .def_prop_ro("array", &array_of)
      .def("__getitem__", [](nb::handle_t<Record> self, nb::handle field) { return nb::object(array_of(self)[nb::make_tuple()][field]); });
  nb::class_<BroadcastHandle>(m, "BroadcastPort")
      .def(nb::init<nb::dict>())
      .def("send", &BroadcastHandle::send, arg("record"))
      .def("receive", &BroadcastHandle::receive, arg("timeout") = nb::none())
      .def("latest", &BroadcastHandle::latest)
      .def("close", &BroadcastHandle::close)
      .def_prop_ro("closed", &BroadcastHandle::closed)
      .def_ro("name", &BroadcastHandle::name)
      .def_ro("lost", &BroadcastHandle::lost)
      .def_ro("record_dtype", &BroadcastHandle::dtype)
      .def_prop_rw("spin_us", [](BroadcastHandle& h) { return static_cast<double>(h.spin_ns) / 1000; },
                   [](BroadcastHandle& h, double us) { h.spin_ns = spin_of(us); })
      .def("_pending", [](BroadcastHandle& h, bool) { h.require_open(); return h.port.items_ready(); }, arg("space") = false)
      .def("_open_fifo", [](BroadcastHandle& h) { h.require_open(); return fifo_of(h.port); })
      .def("_arm_fifo", [](BroadcastHandle& h, bool space) { h.require_open(); h.port.arm_fifo(space); }, arg("space") = false);
}

}  // namespace sage_edge::mailbox::python
