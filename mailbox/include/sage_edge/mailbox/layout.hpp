// The bytes of a port, layout version 1. LAYOUT.md explains each field and who may write it; offsets are asserted below.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace sage_edge::mailbox {

constexpr std::uint64_t kMagic = 0x584F424D45474153ull;  // "SAGEMBOX" as a little-endian word
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kParticipants = 64;
constexpr std::uint32_t kMaxSlots = 1024;
constexpr std::uint32_t kMaxRings = 64;
constexpr std::uint32_t kMaxRecordBytes = 256;
constexpr std::uint64_t kMaxSlotBytes = 1ull << 40;
constexpr std::uint32_t kMaxSpecBytes = 3072;
constexpr std::uint32_t kMaxAxes = 8;
constexpr std::uint32_t kMaxStridedAxes = 4;
constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kHugePage = 2u << 20;
constexpr std::uint64_t kLine = 64;
constexpr std::uint64_t kLastTicket = (1ull << 48) - 1;
constexpr std::uint32_t kFlagHugePages = 1;
constexpr std::uint8_t kStrided = 0x80;

enum class Kind : std::uint32_t { Broadcast = 1, Focus = 2 };
enum class Memory : std::uint32_t { Shm = 1, ShmCuda = 2, Vmm = 3 };
enum class Policy : std::uint32_t { None = 0, Block = 1, DropOldest = 2, DropLowestTrust = 3, Refuse = 4 };
enum class State : std::uint8_t { Free = 0, Loaned = 1, Ready = 2, Held = 3 };
enum class DType : std::uint8_t {
  Bool = 1, Int8, Int16, Int32, Int64, UInt8, UInt16, UInt32, UInt64, Float16, Float32, Float64, Complex64, Complex128, BFloat16
};
enum class Counter : std::uint32_t { Sent, Received, Dropped, Stale, Refused, Lost, Corrupt, Reclaimed, Cancelled, Wakes, Count };

struct Header {
  std::uint64_t magic;
  std::uint32_t version, kind, memory, participants;
  std::uint64_t total_bytes, payload_offset, payload_bytes;
  std::uint32_t slots, rings;
  std::uint64_t slot_bytes;
  std::uint32_t record_bytes, policy, per_producer, ttl_us;
  std::uint64_t pid_namespace, created_ns;
  std::uint32_t spec_bytes, flags;
  std::uint8_t reserved[1024 - 104];
  char spec[kMaxSpecBytes];
};

struct Control {
  alignas(kLine) std::atomic<std::uint64_t> tickets;
  alignas(kLine) std::atomic<std::uint32_t> items_event;
  alignas(kLine) std::atomic<std::uint32_t> space_event;
  alignas(kLine) std::atomic<std::uint32_t> removed;
};

struct alignas(kLine) Participant {
  std::atomic<std::uint64_t> identity;
  std::atomic<std::uint32_t> role, fifo_armed;
  std::atomic<std::uint64_t> opened_ns;
  std::uint64_t reserved;
  std::atomic<std::uint64_t> name[4];
};

struct Statistics {
  std::atomic<std::uint64_t> counters[16];
  std::atomic<std::uint64_t> latency[112];
};

struct Slot {
  std::atomic<std::uint64_t> word, sent_ns;
};

struct Descriptor {  // as a value; in shared memory it is DescriptorWords
  std::uint64_t id, captured_ns;
  std::uint32_t ttl_us, tag;
  std::uint16_t trust, event;
  std::uint8_t dtype, ndim, device_type, device;
  std::uint32_t extent[8];
};

struct alignas(kLine) DescriptorWords {
  std::atomic<std::uint64_t> words[8];
};

struct alignas(kLine) Ring {
  std::atomic<std::uint64_t> owner, head;
};

struct Cell {
  std::atomic<std::uint64_t> sent_ns;
  std::atomic<std::uint64_t> words[1];  // as many as the record needs
};

constexpr std::uint64_t kControlOffset = 4096;
constexpr std::uint64_t kParticipantsOffset = 4352;
constexpr std::uint64_t kStatisticsOffset = 8448;
constexpr std::uint64_t kTableOffset = 73984;  // slots of a focus port, rings of a broadcast port

static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free,
              "atomics in shared memory must not hide a lock of one process");
static_assert(sizeof(std::atomic<std::uint64_t>) == 8 && sizeof(std::atomic<std::uint32_t>) == 4);
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the layout is little-endian"
#endif
static_assert(sizeof(Header) == kControlOffset && offsetof(Header, total_bytes) == 24 && offsetof(Header, slots) == 48);
static_assert(offsetof(Header, record_bytes) == 64 && offsetof(Header, pid_namespace) == 80 && offsetof(Header, spec) == 1024);
static_assert(sizeof(Control) == 256 && kControlOffset + sizeof(Control) == kParticipantsOffset);
static_assert(sizeof(Participant) == 64 && offsetof(Participant, name) == 32);
static_assert(kParticipantsOffset + kParticipants * sizeof(Participant) == kStatisticsOffset);
static_assert(sizeof(Statistics) == 1024 && kStatisticsOffset + kParticipants * sizeof(Statistics) == kTableOffset);
static_assert(kTableOffset % kLine == 0);
static_assert(sizeof(Slot) == 16 && sizeof(Descriptor) == 64 && sizeof(DescriptorWords) == 64 && sizeof(Ring) == 64);
static_assert(offsetof(Descriptor, trust) == 24 && offsetof(Descriptor, dtype) == 28 && offsetof(Descriptor, extent) == 32);

// --- the slot word: ticket << 16 | owner << 8 | state

constexpr std::uint64_t make_word(std::uint64_t ticket, std::uint32_t owner, State state) {
  return ticket << 16 | std::uint64_t{owner} << 8 | static_cast<std::uint64_t>(state);
}
constexpr State state_of(std::uint64_t word) { return static_cast<State>(word & 0xFF); }
constexpr std::uint32_t owner_of(std::uint64_t word) { return word >> 8 & 0xFF; }
constexpr std::uint64_t ticket_of(std::uint64_t word) { return word >> 16; }

// --- what the numbers of a header imply

struct Geometry {
  Kind kind;
  Memory memory;
  std::uint32_t slots, rings;
  std::uint64_t slot_bytes;
  std::uint32_t record_bytes;
  Policy policy;
  std::uint32_t per_producer, ttl_us, flags;
};

constexpr bool operator==(const Geometry& a, const Geometry& b) {
  return a.kind == b.kind && a.memory == b.memory && a.slots == b.slots && a.rings == b.rings && a.slot_bytes == b.slot_bytes &&
         a.record_bytes == b.record_bytes && a.policy == b.policy && a.per_producer == b.per_producer &&
         a.ttl_us == b.ttl_us && a.flags == b.flags;
}

struct Plan {
  std::uint64_t descriptors_offset, payload_offset, payload_bytes, total_bytes;
};

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Offsets and sizes of a port, or the name of the first field that is out of range (nullptr when all is well).
const char* plan(const Geometry& geometry, Plan& out) noexcept;

// Bytes of one element; 0 for an unknown dtype.
std::uint32_t item_bytes(std::uint8_t dtype) noexcept;

// The name of the first field of a descriptor that is impossible for this slot, or nullptr.
const char* check(const Descriptor& descriptor, std::uint32_t slot, std::uint64_t ticket, std::uint64_t slot_bytes) noexcept;

// Histogram bucket of a latency: four per octave from 64 ns.
constexpr std::uint32_t latency_bucket(std::uint64_t ns) {
  if (ns < 64) return 0;
  const std::uint32_t octave = 63u - static_cast<std::uint32_t>(__builtin_clzll(ns));
  const std::uint32_t bucket = (octave - 6) * 4 + static_cast<std::uint32_t>(ns >> (octave - 2) & 3);
  return bucket < 111 ? bucket : 111;
}

}  // namespace sage_edge::mailbox
