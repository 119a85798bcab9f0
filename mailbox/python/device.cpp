// What memory kinds and device code need of an open port: where it is mapped, whose entry it is, where its payloads lie, and a
// way to wake waiters after a kernel has changed something (LAYOUT.md section 9).
#include "broadcast.hpp"
#include "focus.hpp"

namespace sage_edge::mailbox::python {
namespace {

using std::memory_order_acquire;

// (address, bytes, payload_offset, participant, identity, created_ns) of an open port.
nb::tuple mapping(const std::string& name, Port& port) {
  if (port.closed()) raise(errors.closed, "port %s: is closed here; open it again", name.c_str());
  Region& r = port.region();
  return nb::make_tuple(reinterpret_cast<std::uint64_t>(r.base()), r.layout().total_bytes, r.layout().payload_offset, port.index(),
                        r.participant(port.index()).identity.load(memory_order_acquire), r.header().created_ns);
}

// (identity, opened_ns) of a participant; identity 0: nobody.
nb::tuple participant(FocusHandle& h, std::uint32_t index) {
  h.require_open();
  if (index >= kParticipants) raise(errors.input, "port %s: participant: expected 0..63, found %u", h.name.c_str(), index);
  Participant& p = h.port.region().participant(index);
  return nb::make_tuple(p.identity.load(memory_order_acquire), p.opened_ns.load(memory_order_acquire));
}

// Says where the payloads lie: `payload` is the address of slot 0, 0 to leave them in the file; `device_base` is where a device sees
// the mapping, 0 when the payload's address is the device's own.
void place(FocusHandle& h, std::uint64_t payload, std::uint64_t device_base, std::uint8_t device_type, std::uint8_t device) {
  h.require_open();
  Region& r = h.port.region();
  if (payload) r.set_payload(reinterpret_cast<void*>(payload));
  h.device_base = device_base ? device_base : reinterpret_cast<std::uint64_t>(r.base());
  h.device_type = device_type;
  h.device = device;
}

void signal(Port& port, bool space) {
  signal_event(port.region(), space ? port.region().control().space_event : port.region().control().items_event);
}

}  // namespace

void bind_device(nb::module_& m) {
  using nb::arg;
  m.def("mapping", [](FocusHandle& h) { return mapping(h.name, h.port); }, arg("port"));
  m.def("mapping", [](BroadcastHandle& h) { return mapping(h.name, h.port); }, arg("port"));
  m.def("pinned", &FocusHandle::pinned, arg("port"));
  m.def("participant", &participant, arg("port"), arg("index"));
  m.def("place", &place, arg("port"), nb::kw_only(), arg("payload"), arg("device_base"), arg("device_type"), arg("device"));
  m.def("signal", [](FocusHandle& h) { h.require_open(); signal(h.port, false); signal(h.port, true); }, arg("port"));
  m.def("signal", [](BroadcastHandle& h) { h.require_open(); signal(h.port, false); }, arg("port"));
}

}  // namespace sage_edge::mailbox::python
