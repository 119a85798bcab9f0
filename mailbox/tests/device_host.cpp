// device.cuh as host code, for tests without a GPU: every number against layout.hpp, and the functions through a C interface.
#include <cstddef>
#include <cstring>
#include <initializer_list>

#include "sage_edge/mailbox/device.cuh"
#include "sage_edge/mailbox/layout.hpp"

namespace core = sage_edge::mailbox;
using namespace sage_edge::mailbox::device;

static_assert(kTickets == core::kControlOffset + offsetof(core::Control, tickets));
static_assert(kRemoved == core::kControlOffset + offsetof(core::Control, removed));
static_assert(kStatistics == core::kStatisticsOffset && kStatisticsBytes == sizeof(core::Statistics));
static_assert(kTable == core::kTableOffset && kLastTicket == core::kLastTicket);
static_assert(kMaxAxes == core::kMaxAxes && kMaxStridedAxes == core::kMaxStridedAxes && kStrided == core::kStrided);
static_assert(sizeof(Descriptor) == sizeof(core::Descriptor));
static_assert(offsetof(Descriptor, ttl_us) == offsetof(core::Descriptor, ttl_us));
static_assert(offsetof(Descriptor, trust) == offsetof(core::Descriptor, trust));
static_assert(offsetof(Descriptor, dtype) == offsetof(core::Descriptor, dtype));
static_assert(offsetof(Descriptor, extent) == offsetof(core::Descriptor, extent));
template <class A, class B>
constexpr bool same(A a, B b) { return static_cast<unsigned>(a) == static_cast<unsigned>(b); }
static_assert(same(kFree, core::State::Free) && same(kLoaned, core::State::Loaned) && same(kReady, core::State::Ready) &&
              same(kHeld, core::State::Held));
static_assert(same(kBlock, core::Policy::Block) && same(kDropOldest, core::Policy::DropOldest) &&
              same(kDropLowestTrust, core::Policy::DropLowestTrust) && same(kRefuse, core::Policy::Refuse));
static_assert(same(kSent, core::Counter::Sent) && same(kReceived, core::Counter::Received) &&
              same(kDropped, core::Counter::Dropped) && same(kStale, core::Counter::Stale) &&
              same(kRefused, core::Counter::Refused) && same(kLost, core::Counter::Lost) &&
              same(kCorrupt, core::Counter::Corrupt) && same(kCancelled, core::Counter::Cancelled));

extern "C" {

// What differs between the two sides for one focus and one broadcast geometry: 0 when nothing does.
int device_host_offsets(unsigned slots, unsigned rings, unsigned ring, unsigned record_bytes) {
  alignas(64) static unsigned char file[1];
  core::Plan plan{};
  core::Geometry focus{core::Kind::Focus, core::Memory::Shm, slots, 0, 4096, 0, core::Policy::Block, 0, 0, 0};
  if (core::plan(focus, plan)) return 1;
  const Focus port = make_focus(file, file + plan.payload_offset, slots, 4096, 0, kBlock, 0, 0);
  if (reinterpret_cast<u8*>(descriptor_at(port, slots - 1)) - file !=
      static_cast<std::ptrdiff_t>(plan.descriptors_offset + 64ull * (slots - 1))) return 2;
  if (reinterpret_cast<u8*>(word_at(port, slots - 1)) - file !=
      static_cast<std::ptrdiff_t>(core::kTableOffset + sizeof(core::Slot) * (slots - 1))) return 3;
  unsigned cells = 2;
  while (cells < slots) cells *= 2;
  const std::uint64_t cell = core::round_up(8 + core::round_up(record_bytes, 8), core::kLine);
  core::Geometry cast{core::Kind::Broadcast, core::Memory::Shm, cells, rings, cell, record_bytes, core::Policy::None, 0, 0, 0};
  if (core::plan(cast, plan)) return 4;
  const Ring view = make_ring(file, rings, ring, cells, cell, record_bytes, 0);
  if (view.cells - file != static_cast<std::ptrdiff_t>(plan.payload_offset + ring * cells * cell)) return 5;
  if (reinterpret_cast<u8*>(view.head) - file !=
      static_cast<std::ptrdiff_t>(core::kTableOffset + sizeof(core::Ring) * ring + offsetof(core::Ring, head))) return 6;
  return 0;
}

// Does `possible` say what layout.cpp's `check` says? 1 agree, 0 differ.
int device_host_agrees(const void* bytes, unsigned slot, u64 ticket, u64 slot_bytes) {
  Descriptor ours;
  core::Descriptor theirs;
  std::memcpy(&ours, bytes, 64);
  std::memcpy(&theirs, bytes, 64);
  return possible(ours, slot, ticket, slot_bytes) == (core::check(theirs, slot, ticket, slot_bytes) == nullptr);
}

void device_host_focus(Focus* out, u8* base, u8* payload, u32 slots, u64 slot_bytes, u32 participant, u32 policy,
                       u32 per_producer, u32 ttl_us) {
  *out = make_focus(base, payload, slots, slot_bytes, participant, policy, per_producer, ttl_us);
}
void device_host_ring(Ring* out, u8* base, u32 rings, u32 ring, u32 slots, u64 cell_bytes, u32 record_bytes, u32 participant) {
  *out = make_ring(base, rings, ring, slots, cell_bytes, record_bytes, participant);
}
int device_host_loan(const Focus* port, u32 trust, u64 now_ns, Claim* out) { return try_loan(*port, trust, now_ns, *out); }
int device_host_push(const Focus* port, const Claim* loan, const Descriptor* descriptor, u64 now_ns) {
  return push(*port, *loan, *descriptor, now_ns);
}
int device_host_cancel(const Focus* port, const Claim* loan) { return cancel(*port, *loan); }
int device_host_pop(const Focus* port, u64 now_ns, Claim* out, Descriptor* descriptor) {
  return try_pop(*port, now_ns, *out, *descriptor);
}
int device_host_release(const Focus* port, const Claim* item) { return release(*port, *item); }
int device_host_ring_push(const Ring* ring, const u64* record, u64 now_ns) { return try_push(*ring, record, now_ns); }
int device_host_ring_pop(const Ring* ring, u64* cursor, u64* record, u64* sent_ns, u64* lost) {
  return try_pop(*ring, *cursor, record, *sent_ns, *lost);
}
}
