// The mailbox for C++: regions (a port's memory), participants, and the two kinds of port. Nothing here throws.
//
// A handle belongs to one thread at a time; several handles may share a Region. The numbered steps of LAYOUT.md are named in
// the sources where they are carried out.
#pragma once

#include "sage_edge/mailbox/layout.hpp"

namespace sage_edge::mailbox {

enum class Status {
  Ok,
  Empty,           // nothing to receive, or the time is over
  Full,            // no slot can be loaned
  Capped,          // this producer has its share of slots
  LessTrusted,     // full, and all that waits is trusted more
  Removed,         // somebody removed the port: open it again
  Forked,          // the handle was opened before a fork
  Stale,           // the slot has moved on
  Corrupt,         // shared memory holds an impossible value; `detail` names the field
  WornOut,         // 2^48 tickets are given out
  NoRing,          // all rings of a broadcast port have living owners
  NoParticipant,   // all entries of the participant table are taken
  Mismatch,        // another layout, geometry or spec: `message` and `found_spec` show both sides
  NotPrivate,      // owner or permissions are not those of a port
  PidNamespace,    // made in another pid namespace: the dead could not be told from the living
  NoProc,          // /proc does not show this process
  System,          // a system call failed: `message`, `number` (errno)
};

struct Failure {
  Status status = Status::Ok;
  int number = 0;
  char message[256] = {};
  char found_spec[kMaxSpecBytes + 1] = {};
};

std::uint64_t now_ns() noexcept;  // CLOCK_MONOTONIC

// --- liveness (LAYOUT.md section 6)

constexpr std::uint64_t make_identity(std::uint64_t start_time, std::uint64_t pid) { return start_time << 22 | pid; }
constexpr std::uint32_t pid_of(std::uint64_t identity) { return identity & ((1u << 22) - 1); }
std::uint64_t own_identity() noexcept;  // 0 when /proc does not show this process
bool is_dead(std::uint64_t identity) noexcept;
std::uint64_t fork_count() noexcept;  // how many forks lie between this process and the one that first asked

// --- a port's memory

class Region {
 public:
  // Opens the port `name` in the directory `directory_fd` (kept open as a duplicate); creates it when `create` and absent.
  // `spec` is what both sides must agree on. Null and `failure` filled when refused.
  static Region* open(int directory_fd, const char* name, const Geometry& geometry, const char* spec, bool create,
                      Failure& failure) noexcept;
  // Opens an existing port as it is, for looking (read-only mapping) or for removal.
  static Region* attach(int directory_fd, const char* name, bool writable, Failure& failure) noexcept;
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  const Geometry& geometry() const noexcept { return geometry_; }
  const Plan& layout() const noexcept { return plan_; }
  const Header& header() const noexcept { return header_; }  // the private copy that was checked
  Control& control() const noexcept { return *at<Control>(kControlOffset); }
  Participant& participant(std::uint32_t i) const noexcept { return at<Participant>(kParticipantsOffset)[i]; }
  Statistics& statistics(std::uint32_t i) const noexcept { return at<Statistics>(kStatisticsOffset)[i]; }
  Slot* slots() const noexcept { return at<Slot>(kTableOffset); }
  DescriptorWords& descriptor(std::uint32_t i) const noexcept { return at<DescriptorWords>(plan_.descriptors_offset)[i]; }
  Ring& ring(std::uint32_t i) const noexcept { return at<Ring>(kTableOffset)[i]; }
  Cell& cell(std::uint32_t ring, std::uint64_t number) const noexcept {
    const std::uint64_t index = std::uint64_t{ring} * geometry_.slots + (number & (geometry_.slots - 1));
    return *at<Cell>(plan_.payload_offset + index * geometry_.slot_bytes);
  }
  std::uint8_t* payload(std::uint32_t slot) const noexcept { return payload_ + slot * geometry_.slot_bytes; }
  std::uint8_t* base() const noexcept { return base_; }
  // Where payloads are when they do not lie in the file (memory kind vmm).
  void set_payload(void* base) noexcept { payload_ = static_cast<std::uint8_t*>(base); }
  bool huge_pages() const noexcept { return huge_pages_; }  // asked for, and accepted by the kernel

  void remove() noexcept;  // marks the port removed, wakes everybody, unlinks the file; needs a writable mapping
  // Name and directory of the FIFO of a participant.
  int directory() const noexcept { return directory_; }
  void fifo_name(char (&out)[160], std::uint32_t index, std::uint64_t identity) const noexcept;

 private:
  Region() = default;
  template <class T>
  T* at(std::uint64_t offset) const noexcept { return reinterpret_cast<T*>(base_ + offset); }
  bool read_header(int fd, Failure& failure) noexcept;
  bool map(int fd, bool writable, Failure& failure) noexcept;

  Header header_;
  Geometry geometry_{};
  Plan plan_{};
  std::uint8_t* base_ = nullptr;
  std::uint8_t* payload_ = nullptr;
  int directory_ = -1;
  std::uint64_t inode_ = 0;
  bool huge_pages_ = false;
  char name_[64] = {};
};

// --- event words (LAYOUT.md section 7)

enum class Woken { Ready, Slice, Interrupted, Timeout };  // Slice: 50 ms are over, time to sweep and look again

constexpr std::uint64_t kForever = ~0ull;
constexpr std::uint64_t kSliceNs = 50'000'000;   // longest sleep, and how often a handle sweeps
constexpr std::uint64_t kUrgentNs = 5'000'000;   // at most this often when a loan would fail

// Tells the core that this is a spin loop.
inline void pause_core() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // yield is a no-op on most cores
#endif
}

// --- what both kinds of port share

class Port {
 public:
  bool closed() const noexcept { return index_ < 0; }
  Region& region() const noexcept { return *region_; }
  std::uint32_t index() const noexcept { return static_cast<std::uint32_t>(index_); }
  std::uint64_t identity() const noexcept { return identity_; }
  Status usable() const noexcept {
    if (region_->control().removed.load(std::memory_order_relaxed)) return Status::Removed;
    return forks_ == fork_count() ? Status::Ok : Status::Forked;
  }
  void count(Counter counter, std::uint64_t by = 1) noexcept;
  // Looks for dead participants if `gate` ns have passed since the last look; returns how many slots came back.
  std::uint32_t sweep(std::uint64_t now, std::uint64_t gate = kSliceNs) noexcept;
  // asyncio: makes this handle's FIFO; its descriptor (read end, non-blocking) or -1 with errno set.
  int open_fifo() noexcept;
  // Arms FIFO and event word; the caller must then look once more before it relies on the FIFO.
  void arm_fifo(bool space) noexcept;
  void leave() noexcept;  // gives the entry back; nothing may be used afterwards

 protected:
  Status join(Region& region, const char* name) noexcept;
  void signal(std::atomic<std::uint32_t>& event) noexcept;
  void note_latency(std::uint64_t ns) noexcept;
  void took_part(std::uint32_t role) noexcept;

  Region* region_ = nullptr;
  int index_ = -1;
  std::uint64_t identity_ = 0;
  std::uint64_t forks_ = 0;
  std::uint64_t swept_ns_ = 0;
  std::uint32_t role_ = 0;
  std::uint32_t reclaimed_before_ = 0;
};

class FocusPort : public Port {
 public:
  struct Loan {
    std::uint32_t slot;
    std::uint64_t word;
  };
  struct Received {
    std::uint32_t slot, producer;
    std::uint64_t word, sent_ns;
    Descriptor descriptor;
    const char* wrong;  // with Status::Corrupt: the field
  };

  Status open(Region& region, const char* name) noexcept { return join(region, name); }
  Status try_loan(std::uint16_t trust, Loan& out) noexcept;
  // Fills id, sends. `sent_ns` 0: now; captured_ns of the descriptor 0: the same.
  Status send(const Loan& loan, Descriptor& descriptor, const char*& wrong) noexcept;
  Status cancel(const Loan& loan) noexcept;
  Status try_receive(Received& out) noexcept;
  Status claim(const Descriptor& descriptor, Received& out) noexcept;
  Status release(std::uint32_t slot, std::uint64_t word) noexcept;
  // Blocks until something may have changed; never changes anything but event words. Safe without the GIL.
  Woken wait_items(std::uint64_t deadline, std::uint64_t spin_ns) const noexcept;
  Woken wait_space(std::uint64_t deadline, std::uint64_t spin_ns) const noexcept;
  bool items_ready() const noexcept;
  bool space_ready() const noexcept;

 private:
  Status take(std::uint32_t slot, std::uint64_t word, std::uint64_t now, Received& out) noexcept;
  bool oldest(std::uint32_t& at, std::uint64_t& word) const noexcept;
  bool drop_stale(std::uint64_t now) noexcept;
  Status steal(bool capped, std::uint16_t trust, Loan& out) noexcept;
};

class BroadcastPort : public Port {
 public:
  struct Received {
    std::uint32_t ring;
    std::uint64_t number, sent_ns, lost;
    std::uint64_t words[kMaxRecordBytes / 8];
  };

  Status open(Region& region, const char* name) noexcept;
  Status send(const void* record, std::uint64_t& number) noexcept;  // record_bytes bytes
  Status try_receive(Received& out) noexcept;
  Status latest(Received& out) noexcept;
  Woken wait_items(std::uint64_t deadline, std::uint64_t spin_ns) const noexcept;
  bool items_ready() const noexcept;
  void leave() noexcept;

 private:
  Status claim_ring() noexcept;
  bool copy(std::uint32_t ring, std::uint64_t number, Received& out) const noexcept;

  int own_ring_ = -1;
  std::uint32_t turn_ = 0;
  std::atomic<std::uint64_t> cursors_[kMaxRings] = {};
  std::uint64_t pending_lost_ = 0;
};

// --- event words, for the ports and for tests

// Tells waiters that something changed; the change itself must be a seq_cst write before. Returns the number of wake calls.
std::uint32_t signal_event(Region& region, std::atomic<std::uint32_t>& event) noexcept;
Woken sleep_on(std::atomic<std::uint32_t>& event, std::uint32_t expected, std::uint64_t deadline, std::uint64_t now) noexcept;

}  // namespace sage_edge::mailbox
