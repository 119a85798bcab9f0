#include "support.hpp"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace sage_edge::mailbox::python {

Errors errors;

namespace {

// A new reference, kept for the life of the process.
PyObject* keep(nb::handle module, const char* name) { return nb::object(module.attr(name)).release().ptr(); }

}  // namespace

void load_errors() {
  nb::module_ own = nb::module_::import_("sage_edge.mailbox.errors");
  nb::module_ shared = nb::module_::import_("sage_edge.errors");
  errors.input = keep(shared, "InputError");
  errors.integrity = keep(shared, "IntegrityError");
  errors.full = keep(own, "FullError");
  errors.closed = keep(own, "ClosedError");
  errors.stale = keep(own, "StaleError");
  errors.mismatch = keep(own, "MismatchError");
  errors.views_alive = keep(own, "ViewsAliveWarning");
}

void raise(PyObject* type, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  PyErr_SetString(type, text);
  throw nb::python_error();
}

void raise_full(const char* reason, const std::string& port, const char* detail) {
  nb::object error = nb::borrow(errors.full)(reason, "port " + port + ": " + detail);
  PyErr_SetObject(errors.full, error.ptr());
  throw nb::python_error();
}

void raise_status(Status status, const std::string& port, const char* detail) {
  const char* p = port.c_str();
  switch (status) {
    case Status::Full: raise_full("full", port, "no slot is free; release items sooner, or raise depth in ports.yaml");
    case Status::Capped: raise_full("cap", port, "this producer has per_producer slots loaned or waiting");
    case Status::LessTrusted: raise_full("trust", port, "no slot is free, and all that waits is trusted more");
    case Status::NoRing: raise_full("producers", port, "all rings have living owners; raise producers in ports.yaml");
    case Status::NoParticipant: raise_full("participants", port, "64 handles are open, all of living processes; close some");
    case Status::Removed: raise(errors.closed, "port %s: was removed; open it again", p);
    case Status::Forked: raise(errors.closed, "port %s: was opened before this process was forked; open it again here", p);
    case Status::Stale: raise(errors.stale, "port %s: the slot has moved on; what this names is gone", p);
    case Status::Corrupt:
      raise(errors.integrity, "port %s: %s is impossible here: another process writes where it must not; the item was dropped", p,
            detail ? detail : "a value in shared memory");
    case Status::WornOut: raise(errors.closed, "port %s: 2^48 tickets are used up; remove the port and open it again", p);
    case Status::NoProc: raise(errors.input, "port %s: /proc does not show this process, so the dead could not be told from the living", p);
    default: raise(PyExc_RuntimeError, "port %s: unexpected status %d", p, static_cast<int>(status));
  }
}

std::uint64_t deadline_of(nb::handle timeout) {
  if (timeout.is_none()) return kForever;
  const double seconds = PyFloat_AsDouble(timeout.ptr());
  if (seconds == -1.0 && PyErr_Occurred()) throw nb::python_error();
  if (seconds == 0) return 0;
  if (!(seconds > 0)) raise(errors.input, "timeout: expected None or seconds of 0 or more, found %g", seconds);
  return seconds > 1e9 ? kForever : now_ns() + static_cast<std::uint64_t>(seconds * 1e9);
}

int fifo_of(Port& port) {
  const int fd = port.open_fifo();
  if (fd < 0) {
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
  return fd;
}

std::uint64_t spin_of(double us) {
  if (!(us >= 0)) raise(errors.input, "spin_us: expected 0 or more, found %g", us);
  return us > 1e15 ? kForever : static_cast<std::uint64_t>(us * 1000);
}

Opening opening_of(nb::dict a) {
  Opening o;
  o.directory = nb::cast<int>(a["directory"]);
  o.name = nb::cast<std::string>(a["name"]);
  o.spec = nb::cast<std::string>(a["spec"]);
  o.label = nb::cast<std::string>(a["label"]);
  o.geometry = {static_cast<Kind>(nb::cast<std::uint32_t>(a["kind"])),
                static_cast<Memory>(nb::cast<std::uint32_t>(a["memory"])),
                nb::cast<std::uint32_t>(a["slots"]),
                nb::cast<std::uint32_t>(a["rings"]),
                nb::cast<std::uint64_t>(a["slot_bytes"]),
                nb::cast<std::uint32_t>(a["record_bytes"]),
                static_cast<Policy>(nb::cast<std::uint32_t>(a["policy"])),
                nb::cast<std::uint32_t>(a["per_producer"]),
                nb::cast<std::uint32_t>(a["ttl_us"]),
                nb::cast<std::uint32_t>(a["flags"])};
  return o;
}

void raise_mismatch(const std::string& port, const Failure& failure, bool show_spec) {
  // MismatchError(message, spec in memory): Python shows both sides. The spec may be any bytes.
  const nb::object found = nb::steal(PyUnicode_DecodeUTF8(failure.found_spec, show_spec ? static_cast<Py_ssize_t>(std::strlen(failure.found_spec)) : 0, "replace"));
  nb::object error = nb::borrow(errors.mismatch)("port " + port + ": " + failure.message, found);
  PyErr_SetObject(errors.mismatch, error.ptr());
  throw nb::python_error();
}

std::unique_ptr<Region> open_region(const Opening& o) {
  auto failure = std::make_unique<Failure>();
  std::unique_ptr<Region> region(without_gil([&] {
    return Region::open(o.directory, o.name.c_str(), o.geometry, o.spec.c_str(), true, *failure);
  }));
  if (region) return region;
  const char* name = o.name.c_str();
  if (failure->status == Status::System) {
    raise(errors.input, "port %s: %s: %s", name, failure->message, std::strerror(failure->number));
  }
  raise_mismatch(o.name, *failure, o.spec != failure->found_spec);
}

}  // namespace sage_edge::mailbox::python
