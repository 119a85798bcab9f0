// What the parts of the Python binding share: errors, timeouts, opening.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "sage_edge/mailbox/mailbox.hpp"

namespace nb = nanobind;

namespace sage_edge::mailbox::python {

// Exception classes of sage_edge.mailbox.errors and sage_edge.errors, looked up once.
struct Errors {
  PyObject *input, *integrity, *full, *closed, *stale, *mismatch, *views_alive;
};
extern Errors errors;
void load_errors();

// Raises the Python exception for a status; `port` names the port in the message.
[[noreturn]] void raise_status(Status status, const std::string& port, const char* detail = nullptr);
[[noreturn]] void raise(PyObject* type, const char* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void raise_full(const char* reason, const std::string& port, const char* detail);

[[noreturn]] void raise_mismatch(const std::string& port, const Failure& failure, bool show_spec);

// Seconds or None → absolute deadline, ns. Raises InputError for a negative number or NaN.
std::uint64_t deadline_of(nb::handle timeout);

// Microseconds to spin before sleeping → ns; infinity: never sleep. Raises InputError below 0.
std::uint64_t spin_of(double microseconds);

// What Python passes to open a port; see namespace.py.
struct Opening {
  int directory;
  std::string name, spec, label;
  Geometry geometry;
};
Opening opening_of(nb::dict arguments);

// A region that is closed with its last user.
std::unique_ptr<Region> open_region(const Opening& opening);

// The port's FIFO for asyncio, opened; OSError when it cannot be.
int fifo_of(Port& port);

template <class F>
auto without_gil(F f) {
  nb::gil_scoped_release released;
  return f();
}

// A look for at most 2 us with the GIL held: giving the GIL away and taking it back costs more than most waits of a busy pair.
constexpr std::uint64_t kBriefNs = 2'000;
template <class Ready>
bool brief_spin(std::uint64_t spin_ns, Ready ready) {
  const std::uint64_t end = now_ns() + (spin_ns < kBriefNs ? spin_ns : kBriefNs);
  do {
    for (int i = 0; i < 4; ++i) {
      if (ready()) return true;
      pause_core();
    }
  } while (now_ns() < end);
  return false;
}

// Waits with `wait(deadline)` and tries after each wait until `attempt()` says true or the time is over. KeyboardInterrupt comes through.
template <class Attempt, class Wait>
bool until(std::uint64_t deadline, Attempt attempt, Wait wait) {
  while (deadline != 0) {
    const Woken woken = without_gil([&] { return wait(deadline); });
    if (woken == Woken::Interrupted || woken == Woken::Slice) {
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
    if (attempt()) return true;
    if (woken == Woken::Timeout) return false;
  }
  return false;
}

}  // namespace sage_edge::mailbox::python
