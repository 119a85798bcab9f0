// A handle on a port: joining, leaving, statistics, and sweeping the dead (LAYOUT.md sections 4 and 6).
#include <cstring>

#include <unistd.h>

#include "internal.hpp"

namespace sage_edge::mailbox {

using std::memory_order_acq_rel;
using std::memory_order_acquire;
using std::memory_order_relaxed;
using std::memory_order_release;
using std::memory_order_seq_cst;

Status Port::join(Region& region, const char* name) noexcept {
  region_ = &region;
  forks_ = fork_count();
  identity_ = own_identity();
  if (!identity_) return Status::NoProc;
  sweep(now_ns(), 0);
  for (std::uint32_t i = 0; i < kParticipants; ++i) {
    Participant& p = region.participant(i);
    std::uint64_t free = 0;
    if (p.identity.load(memory_order_relaxed) || !p.identity.compare_exchange_strong(free, identity_, memory_order_acq_rel)) continue;
    index_ = static_cast<int>(i);
    role_ = 0;
    p.role.store(0, memory_order_relaxed);
    p.fifo_armed.store(0, memory_order_relaxed);
    p.opened_ns.store(now_ns(), memory_order_relaxed);
    char text[sizeof p.name] = {};
    std::strncpy(text, name, sizeof text - 1);
    for (std::uint32_t k = 0; k < 4; ++k) {
      std::uint64_t word;
      std::memcpy(&word, text + 8 * k, 8);
      p.name[k].store(word, memory_order_relaxed);
    }
    if (reclaimed_before_) count(Counter::Reclaimed, reclaimed_before_);
    return Status::Ok;
  }
  return Status::NoParticipant;
}

void Port::leave() noexcept {
  if (index_ < 0) return;
  const std::uint32_t me = index();
  index_ = -1;
  if (forks_ != fork_count()) return;  // the entry is the parent's
  Control& c = region_->control();
  if (region_->geometry().kind == Kind::Focus) {
    for (std::uint32_t i = 0; i < region_->geometry().slots; ++i) {
      std::atomic<std::uint64_t>& word = region_->slots()[i].word;
      std::uint64_t w = word.load(memory_order_acquire);
      if (owner_of(w) != me || (state_of(w) != State::Loaned && state_of(w) != State::Held)) continue;
      const std::uint64_t ticket = state_of(w) == State::Held ? ticket_of(w) : c.tickets.fetch_add(1, memory_order_acq_rel);
      word.compare_exchange_strong(w, make_word(ticket, 0, State::Free), memory_order_seq_cst);
    }
    signal_event(*region_, c.space_event);
  }
  Participant& p = region_->participant(me);
  if (role_ & kHasFifo) {
    char name[160];
    region_->fifo_name(name, me, identity_);
    ::unlinkat(region_->directory(), name, 0);
  }
  std::uint64_t mine = identity_;
  p.identity.compare_exchange_strong(mine, 0, memory_order_release, memory_order_relaxed);
}

void Port::count(Counter counter, std::uint64_t by) noexcept {
  std::atomic<std::uint64_t>& c = region_->statistics(index()).counters[static_cast<std::uint32_t>(counter)];
  c.store(c.load(memory_order_relaxed) + by, memory_order_relaxed);
}

void Port::note_latency(std::uint64_t ns) noexcept {
  std::atomic<std::uint64_t>& c = region_->statistics(index()).latency[latency_bucket(ns)];
  c.store(c.load(memory_order_relaxed) + 1, memory_order_relaxed);
}

void Port::took_part(std::uint32_t role) noexcept {
  if (role_ & role) return;
  role_ |= role;
  region_->participant(index()).role.store(role_ & (kSends | kReceives), memory_order_relaxed);
}

void Port::signal(std::atomic<std::uint32_t>& event) noexcept {
  if (const std::uint32_t calls = signal_event(*region_, event)) count(Counter::Wakes, calls);
}

std::uint32_t Port::sweep(std::uint64_t now, std::uint64_t gate) noexcept {
  if (now - swept_ns_ < gate) return 0;
  swept_ns_ = now;
  Region& r = *region_;
  Control& c = r.control();
  const bool focus = r.geometry().kind == Kind::Focus;
  std::uint32_t freed = 0, left = 0;
  std::uint64_t living = identity_;  // the last process found alive: handles of one process often stand together
  for (std::uint32_t i = 0; i < kParticipants; ++i) {
    std::atomic<std::uint64_t>& identity = r.participant(i).identity;
    std::uint64_t dead = identity.load(memory_order_acquire);
    if (!dead || dead == identity_ || dead == living) continue;
    if (!is_dead(dead)) {  // step 1
      living = dead;
      continue;
    }
    for (std::uint32_t k = 0; focus && k < r.geometry().slots; ++k) {  // step 2
      std::atomic<std::uint64_t>& word = r.slots()[k].word;
      std::uint64_t w = word.load(memory_order_acquire);
      if (owner_of(w) != i || (state_of(w) != State::Loaned && state_of(w) != State::Held)) continue;
      if (identity.load(memory_order_acquire) != dead) break;
      const std::uint64_t ticket = state_of(w) == State::Held ? ticket_of(w) : c.tickets.fetch_add(1, memory_order_acq_rel);
      if (word.compare_exchange_strong(w, make_word(ticket, 0, State::Free), memory_order_seq_cst)) ++freed;
    }
    char name[160];
    r.fifo_name(name, i, dead);
    ::unlinkat(r.directory(), name, 0);
    left += identity.compare_exchange_strong(dead, 0, memory_order_seq_cst);  // step 4
  }
  for (std::uint32_t i = 0; !focus && i < r.geometry().rings; ++i) {  // step 3
    std::uint64_t owner = r.ring(i).owner.load(memory_order_acquire);
    if (!owner || owner == identity_ || owner == living || !is_dead(owner)) continue;
    left += r.ring(i).owner.compare_exchange_strong(owner, 0, memory_order_acq_rel);
  }
  if (index_ >= 0) {
    if (freed) count(Counter::Reclaimed, freed);
  } else {
    reclaimed_before_ += freed;  // no entry of one's own yet to count it in: see join
  }
  if (freed) signal_event(r, c.space_event);
  return freed + left;
}

}  // namespace sage_edge::mailbox
