// sage_edge.mailbox._native: the mailbox for Python.
#include "broadcast.hpp"
#include "focus.hpp"

namespace sage_edge::mailbox::python {

void bind_device(nb::module_& m);
void bind_observer(nb::module_& m);

namespace {

// Offset and size of every field as the compiler has laid them out; a test compares them with sage_edge/mailbox/layout.py.
nb::dict layout() {
  nb::dict d;
#define FIELD(type, field) d[#type "." #field] = nb::make_tuple(offsetof(type, field), sizeof(type::field))
  FIELD(Header, magic); FIELD(Header, version); FIELD(Header, kind); FIELD(Header, memory); FIELD(Header, participants);
  FIELD(Header, total_bytes); FIELD(Header, payload_offset); FIELD(Header, payload_bytes); FIELD(Header, slots);
  FIELD(Header, rings); FIELD(Header, slot_bytes); FIELD(Header, record_bytes); FIELD(Header, policy);
  FIELD(Header, per_producer); FIELD(Header, ttl_us); FIELD(Header, pid_namespace); FIELD(Header, created_ns);
  FIELD(Header, spec_bytes); FIELD(Header, flags); FIELD(Header, reserved); FIELD(Header, spec);
  FIELD(Control, tickets); FIELD(Control, items_event); FIELD(Control, space_event); FIELD(Control, removed);
  FIELD(Participant, identity); FIELD(Participant, role); FIELD(Participant, fifo_armed); FIELD(Participant, opened_ns);
  FIELD(Participant, reserved); FIELD(Participant, name);
  FIELD(Statistics, counters); FIELD(Statistics, latency);
  FIELD(Slot, word); FIELD(Slot, sent_ns);
  FIELD(Descriptor, id); FIELD(Descriptor, captured_ns); FIELD(Descriptor, ttl_us); FIELD(Descriptor, tag);
  FIELD(Descriptor, trust); FIELD(Descriptor, event); FIELD(Descriptor, dtype); FIELD(Descriptor, ndim);
  FIELD(Descriptor, device_type); FIELD(Descriptor, device); FIELD(Descriptor, extent);
  FIELD(Ring, owner); FIELD(Ring, head);
#undef FIELD
#define SIZE(type) d[#type] = nb::make_tuple(0, sizeof(type))
  SIZE(Header); SIZE(Control); SIZE(Participant); SIZE(Statistics); SIZE(Slot); SIZE(Descriptor); SIZE(Ring);
#undef SIZE
  d["kControlOffset"] = nb::make_tuple(kControlOffset, 0);
  d["kParticipantsOffset"] = nb::make_tuple(kParticipantsOffset, 0);
  d["kStatisticsOffset"] = nb::make_tuple(kStatisticsOffset, 0);
  d["kTableOffset"] = nb::make_tuple(kTableOffset, 0);
  return d;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // ports that are open at exit are no fault: others take back what they held
  load_errors();
  load_numpy();
  bind_focus(m);
  bind_broadcast(m);
  bind_observer(m);
  bind_device(m);
  m.def("layout", &layout);
  m.def("latency_bucket", &latency_bucket, nb::arg("ns"));
  m.attr("VERSION") = kVersion;
}

}  // namespace sage_edge::mailbox::python
