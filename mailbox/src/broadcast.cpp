// The broadcast port: one ring a producer, newest wins (LAYOUT.md section 8, whose step numbers are named here).
#include <cstring>

#include "internal.hpp"

namespace sage_edge::mailbox {

using std::memory_order_acq_rel;
using std::memory_order_acquire;
using std::memory_order_relaxed;
using std::memory_order_release;
using std::memory_order_seq_cst;

Status BroadcastPort::open(Region& region, const char* name) noexcept {
  const Status s = join(region, name);
  if (s != Status::Ok) return s;
  // A reader begins with what comes; `latest` shows what was there.
  for (std::uint32_t i = 0; i < region.geometry().rings; ++i) {
    cursors_[i].store(region.ring(i).head.load(memory_order_acquire), memory_order_relaxed);
  }
  return Status::Ok;
}

Status BroadcastPort::claim_ring() noexcept {
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (std::uint32_t i = 0; i < region_->geometry().rings; ++i) {
      std::atomic<std::uint64_t>& owner = region_->ring(i).owner;
      std::uint64_t free = 0;
      // Acquire: the last owner's head and cells come before ours.
      if (owner.load(memory_order_relaxed) || !owner.compare_exchange_strong(free, identity_, memory_order_acq_rel)) continue;
      own_ring_ = static_cast<int>(i);
      return Status::Ok;
    }
    sweep(now_ns(), kUrgentNs);
  }
  return Status::NoRing;
}

Status BroadcastPort::send(const void* record, std::uint64_t& number) noexcept {
  if (const Status s = usable(); s != Status::Ok) return s;
  if (own_ring_ < 0) {
    if (const Status s = claim_ring(); s != Status::Ok) {
      count(Counter::Refused);
      return s;
    }
  }
  Ring& ring = region_->ring(static_cast<std::uint32_t>(own_ring_));
  const std::uint64_t now = now_ns();
  const std::uint64_t n = ring.head.load(memory_order_relaxed);  // step 1
  Cell& cell = region_->cell(static_cast<std::uint32_t>(own_ring_), n);
  std::atomic_thread_fence(memory_order_release);  // step 2
  cell.sent_ns.store(now, memory_order_relaxed);   // step 3
  const std::uint32_t bytes = region_->geometry().record_bytes;
  const auto* from = static_cast<const std::uint8_t*>(record);
  for (std::uint32_t at = 0, i = 0; at < bytes; at += 8, ++i) {
    std::uint64_t word = 0;
    std::memcpy(&word, from + at, bytes - at < 8 ? bytes - at : 8);
    cell.words[i].store(word, memory_order_relaxed);
  }
  ring.head.store(n + 1, memory_order_seq_cst);  // step 4
  number = n;
  took_part(kSends);
  count(Counter::Sent);
  signal(region_->control().items_event);  // step 5
  sweep(now);
  return Status::Ok;
}

// Steps 3 to 5 of reading. False: the writer has come round, the copy is worthless.
bool BroadcastPort::copy(std::uint32_t ring, std::uint64_t number, Received& out) const noexcept {
  const Cell& cell = region_->cell(ring, number);
  out.ring = ring;
  out.number = number;
  out.sent_ns = cell.sent_ns.load(memory_order_relaxed);
  const std::uint32_t words = (region_->geometry().record_bytes + 7) / 8;
  for (std::uint32_t i = 0; i < words; ++i) out.words[i] = cell.words[i].load(memory_order_relaxed);
  std::atomic_thread_fence(memory_order_acquire);
  const std::uint64_t head = region_->ring(ring).head.load(memory_order_relaxed);
  return head - number <= region_->geometry().slots - 1;
}

Status BroadcastPort::try_receive(Received& out) noexcept {
  if (const Status s = usable(); s != Status::Ok) return s;
  const std::uint32_t rings = region_->geometry().rings;
  const std::uint64_t reach = region_->geometry().slots - 1;
  for (std::uint32_t i = 0; i < rings; ++i) {
    const std::uint32_t r = turn_ + i < rings ? turn_ + i : turn_ + i - rings;
    std::uint64_t n = cursors_[r].load(memory_order_relaxed);
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      const std::uint64_t head = region_->ring(r).head.load(memory_order_acquire);  // step 1
      if (head == n) break;
      if (head - n >= 1ull << 48) {  // backwards, or further than anybody can write
        cursors_[r].store(head, memory_order_relaxed);
        count(Counter::Corrupt);
        return Status::Corrupt;
      }
      if (head - n > reach) {  // step 2
        pending_lost_ += head - n - reach;
        count(Counter::Lost, head - n - reach);
        n = head - reach;
        cursors_[r].store(n, memory_order_relaxed);
      }
      if (!copy(r, n, out)) continue;
      cursors_[r].store(n + 1, memory_order_relaxed);  // step 6
      turn_ = r + 1 < rings ? r + 1 : 0;
      out.lost = pending_lost_;
      pending_lost_ = 0;
      took_part(kReceives);
      count(Counter::Received);
      const std::uint64_t now = now_ns();
      note_latency(now > out.sent_ns ? now - out.sent_ns : 0);
      sweep(now);
      return Status::Ok;
    }
  }
  sweep(now_ns());
  return Status::Empty;
}

Status BroadcastPort::latest(Received& out) noexcept {
  if (const Status s = usable(); s != Status::Ok) return s;
  Received candidate;
  bool found = false;
  for (std::uint32_t r = 0; r < region_->geometry().rings; ++r) {
    std::uint64_t head = region_->ring(r).head.load(memory_order_acquire);
    bool copied = false;
    for (int attempt = 0; head && !copied && attempt < kAttempts; ++attempt) {
      copied = copy(r, head - 1, candidate);
      if (!copied) head = region_->ring(r).head.load(memory_order_acquire);
    }
    if (!copied || (found && candidate.sent_ns <= out.sent_ns)) continue;
    out = candidate;
    found = true;
  }
  out.lost = 0;
  return found ? Status::Ok : Status::Empty;
}

bool BroadcastPort::items_ready() const noexcept {
  for (std::uint32_t r = 0; r < region_->geometry().rings; ++r) {
    if (region_->ring(r).head.load(memory_order_seq_cst) != cursors_[r].load(memory_order_relaxed)) return true;
  }
  return region_->control().removed.load(memory_order_seq_cst) != 0;
}

Woken BroadcastPort::wait_items(std::uint64_t deadline, std::uint64_t spin_ns) const noexcept {
  return wait_event(region_->control().items_event, deadline, spin_ns, [this] { return items_ready(); });
}

void BroadcastPort::leave() noexcept {
  if (own_ring_ >= 0 && forks_ == fork_count()) {
    std::uint64_t mine = identity_;
    region_->ring(static_cast<std::uint32_t>(own_ring_)).owner.compare_exchange_strong(mine, 0, memory_order_release, memory_order_relaxed);
  }
  own_ring_ = -1;
  Port::leave();
}

}  // namespace sage_edge::mailbox
