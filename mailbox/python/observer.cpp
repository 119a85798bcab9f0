// Looking on: a read-only mapping of a port, for `sage-edge mailbox ls | top | tap`. Copies of words; Python makes sense of them.
#include <cstring>

#include "support.hpp"

namespace sage_edge::mailbox::python {
namespace {

using std::memory_order_acquire;
using std::memory_order_relaxed;

class Observer {
 public:
  Observer(int directory, const std::string& name) : name_(name) {
    auto failure = std::make_unique<Failure>();
    region_.reset(Region::attach(directory, name.c_str(), false, *failure));
    if (region_) return;
    if (failure->status == Status::System) {
      raise(errors.input, "port %s: %s: %s", name.c_str(), failure->message, std::strerror(failure->number));
    }
    raise_mismatch(name, *failure, false);
  }

  nb::bytes header() const { return nb::bytes(&region_->header(), sizeof(Header)); }
  bool removed() const { return region_->control().removed.load(memory_order_acquire) != 0; }

  // Control words, participants, statistics and the table (slots or rings), word by word: the layout's bytes from 4096 on.
  nb::bytes tables() const {
    const Geometry& g = region_->geometry();
    const std::uint64_t table = g.kind == Kind::Focus ? g.slots * sizeof(Slot) : g.rings * sizeof(Ring);
    const std::size_t words = (kTableOffset - kControlOffset + table) / 8;
    auto copy = std::make_unique<std::uint64_t[]>(words);
    const auto* from = reinterpret_cast<const std::atomic<std::uint64_t>*>(region_->base() + kControlOffset);
    for (std::size_t i = 0; i < words; ++i) copy[i] = from[i].load(memory_order_relaxed);
    return nb::bytes(copy.get(), words * 8);
  }

  // The descriptor and payload of a slot, copied whole, or None: nothing in it, or it is being written (LAYOUT.md, tap).
  nb::object copy_slot(std::uint32_t index) const {
    const Geometry& g = region_->geometry();
    if (g.kind != Kind::Focus || index >= g.slots || !region_->payload(0)) return nb::none();
    const std::atomic<std::uint64_t>& word = region_->slots()[index].word;
    const std::uint64_t before = word.load(memory_order_acquire);
    if (state_of(before) == State::Loaned || ticket_of(before) == 0) return nb::none();
    Descriptor d;
    std::uint64_t words[8];
    for (int i = 0; i < 8; ++i) words[i] = region_->descriptor(index).words[i].load(memory_order_relaxed);
    std::memcpy(&d, words, sizeof d);
    if (check(d, index, ticket_of(before), g.slot_bytes)) return nb::none();  // also after a cancel: the id is older
    const std::uint64_t sent = region_->slots()[index].sent_ns.load(memory_order_relaxed);
    nb::bytes payload(region_->payload(index), span_of(d));
    std::atomic_thread_fence(memory_order_acquire);
    const std::uint64_t after = word.load(memory_order_relaxed);
    if (ticket_of(after) != ticket_of(before) || state_of(after) == State::Loaned) return nb::none();
    return nb::make_tuple(nb::bytes(&d, sizeof d), sent, payload);
  }

  // A record of a ring, copied whole, as (sent_ns, bytes); None when it is gone or was never written.
  nb::object copy_record(std::uint32_t ring, std::uint64_t number) const {
    const Geometry& g = region_->geometry();
    if (g.kind != Kind::Broadcast || ring >= g.rings) return nb::none();
    const std::atomic<std::uint64_t>& head = region_->ring(ring).head;
    const std::uint64_t newest = head.load(memory_order_acquire);
    if (number >= newest) return nb::none();
    const Cell& cell = region_->cell(ring, number);
    const std::uint64_t sent = cell.sent_ns.load(memory_order_relaxed);
    std::uint64_t words[kMaxRecordBytes / 8];
    for (std::uint32_t i = 0; i < (g.record_bytes + 7) / 8; ++i) words[i] = cell.words[i].load(memory_order_relaxed);
    std::atomic_thread_fence(memory_order_acquire);
    if (head.load(memory_order_relaxed) - number > g.slots - 1) return nb::none();
    return nb::make_tuple(sent, nb::bytes(words, g.record_bytes));
  }

 private:
  // Bytes from the first element to behind the last.
  static std::uint64_t span_of(const Descriptor& d) {
    const std::uint32_t ndim = d.ndim & 0x7F;
    std::uint64_t elements = 1, last = 1;
    for (std::uint32_t i = 0; i < ndim; ++i) {
      elements *= d.extent[i];
      if (d.extent[i]) last += (d.extent[i] - 1ull) * (d.ndim & kStrided ? d.extent[kMaxStridedAxes + i] : 0);
    }
    return (d.ndim & kStrided && elements ? last : elements) * item_bytes(d.dtype);
  }

  std::string name_;
  std::unique_ptr<Region> region_;
};

void remove_port(int directory, const std::string& name) {
  auto failure = std::make_unique<Failure>();
  std::unique_ptr<Region> region(Region::attach(directory, name.c_str(), true, *failure));
  if (!region) {
    if (failure->status == Status::System) raise(errors.input, "port %s: %s: %s", name.c_str(), failure->message, std::strerror(failure->number));
    raise_mismatch(name, *failure, false);
  }
  region->remove();
}

}  // namespace

void bind_observer(nb::module_& m) {
  nb::class_<Observer>(m, "Observer")
      .def(nb::init<int, const std::string&>(), nb::arg("directory"), nb::arg("name"))
      .def("header", &Observer::header)
      .def("tables", &Observer::tables)
      .def("copy_slot", &Observer::copy_slot, nb::arg("slot"))
      .def("copy_record", &Observer::copy_record, nb::arg("ring"), nb::arg("number"))
      .def_prop_ro("removed", &Observer::removed);
  m.def("remove_port", &remove_port, nb::arg("directory"), nb::arg("name"));
  m.def("is_dead", &is_dead, nb::arg("identity"));
  m.def("own_identity", &own_identity);
}

}  // namespace sage_edge::mailbox::python
