// The focus port: loan, send, receive, release (LAYOUT.md section 5, whose step numbers are named here).
#include <cstring>

#include "internal.hpp"

namespace sage_edge::mailbox {
namespace {

using std::memory_order_acq_rel;
using std::memory_order_acquire;
using std::memory_order_relaxed;
using std::memory_order_release;
using std::memory_order_seq_cst;

constexpr std::uint64_t kNoTicket = ~0ull;

void store(DescriptorWords& to, const Descriptor& from) noexcept {
  std::uint64_t words[8];
  std::memcpy(words, &from, sizeof words);
  for (int i = 0; i < 8; ++i) to.words[i].store(words[i], memory_order_relaxed);
}

void load(const DescriptorWords& from, Descriptor& to) noexcept {
  std::uint64_t words[8];
  for (int i = 0; i < 8; ++i) words[i] = from.words[i].load(memory_order_relaxed);
  std::memcpy(&to, words, sizeof words);
}

bool is_stale(const Descriptor& d, std::uint64_t now) noexcept {
  return d.ttl_us && now > d.captured_ns && now - d.captured_ns > d.ttl_us * 1000ull;
}

}  // namespace

Status FocusPort::try_loan(std::uint16_t trust, Loan& out) noexcept {
  const std::uint32_t me = index();
  const Geometry& g = region_->geometry();
  Slot* slots = region_->slots();
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (const Status s = usable(); s != Status::Ok) return s;
    std::uint32_t mine = 0;
    if (g.per_producer) {
      for (std::uint32_t i = 0; i < g.slots; ++i) {
        const std::uint64_t w = slots[i].word.load(memory_order_relaxed);
        mine += owner_of(w) == me && (state_of(w) == State::Loaned || state_of(w) == State::Ready);
      }
    }
    const bool capped = g.per_producer && mine >= g.per_producer;
    for (std::uint32_t i = 0; !capped && i < g.slots; ++i) {  // step 1
      std::uint64_t w = slots[i].word.load(memory_order_relaxed);
      if (state_of(w) != State::Free) continue;
      const std::uint64_t loaned = make_word(ticket_of(w), me, State::Loaned);
      if (!slots[i].word.compare_exchange_strong(w, loaned, memory_order_acquire, memory_order_relaxed)) continue;
      std::atomic_thread_fence(memory_order_release);
      out = {i, loaned};
      return Status::Ok;
    }
    const std::uint64_t now = now_ns();
    if (sweep(now, kUrgentNs) || drop_stale(now)) continue;  // step 2
    switch (g.policy) {                                      // step 3
      case Policy::DropOldest:
      case Policy::DropLowestTrust: {
        const Status s = steal(capped, trust, out);
        if (s == Status::Empty) continue;  // somebody was quicker
        return s;
      }
      default: return capped ? Status::Capped : Status::Full;
    }
  }
  return Status::Full;
}

bool FocusPort::drop_stale(std::uint64_t now) noexcept {
  bool any = false;
  for (std::uint32_t i = 0; i < region_->geometry().slots; ++i) {
    std::atomic<std::uint64_t>& word = region_->slots()[i].word;
    std::uint64_t w = word.load(memory_order_acquire);
    if (state_of(w) != State::Ready) continue;
    Descriptor d;
    load(region_->descriptor(i), d);
    if (!is_stale(d, now)) continue;
    // The descriptor that was read is w's only if the word is still w: then nobody may have written it since.
    if (word.compare_exchange_strong(w, make_word(ticket_of(w), 0, State::Free), memory_order_seq_cst)) {
      count(Counter::Stale);
      any = true;
    }
  }
  if (any) signal(region_->control().space_event);
  return any;
}

// Empty: lost a race, look again from the start.
Status FocusPort::steal(bool capped, std::uint16_t trust, Loan& out) noexcept {
  const std::uint32_t me = index();
  const Geometry& g = region_->geometry();
  std::uint64_t victim = 0, least = kNoTicket;
  std::uint32_t at = 0, least_trust = 0x10000;
  for (std::uint32_t i = 0; i < g.slots; ++i) {
    const std::uint64_t w = region_->slots()[i].word.load(memory_order_acquire);
    if (state_of(w) == State::Free && !capped) return Status::Empty;
    if (state_of(w) != State::Ready || (capped && owner_of(w) != me)) continue;
    std::uint32_t t = 0;
    if (g.policy == Policy::DropLowestTrust) {
      Descriptor d;
      load(region_->descriptor(i), d);
      t = d.trust;
    }
    if (t < least_trust || (t == least_trust && ticket_of(w) < least)) {
      victim = w;
      least = ticket_of(w);
      least_trust = t;
      at = i;
    }
  }
  if (least == kNoTicket) return capped ? Status::Capped : Status::Full;
  if (g.policy == Policy::DropLowestTrust && least_trust > trust) return Status::LessTrusted;
  const std::uint64_t loaned = make_word(least, me, State::Loaned);
  if (!region_->slots()[at].word.compare_exchange_strong(victim, loaned, memory_order_acquire, memory_order_relaxed)) {
    return Status::Empty;
  }
  std::atomic_thread_fence(memory_order_release);
  count(Counter::Dropped);
  out = {at, loaned};
  return Status::Ok;
}

Status FocusPort::send(const Loan& loan, Descriptor& d, const char*& wrong) noexcept {
  if (const Status s = usable(); s != Status::Ok) return s;
  const std::uint64_t now = now_ns();
  const std::uint64_t ticket = region_->control().tickets.fetch_add(1, memory_order_acq_rel);  // step 1
  if (ticket >= kLastTicket) return Status::WornOut;
  d.id = ticket << 16 | loan.slot;
  if (!d.captured_ns) d.captured_ns = now;
  wrong = check(d, loan.slot, ticket, region_->geometry().slot_bytes);
  if (wrong) return Status::Corrupt;
  Slot& slot = region_->slots()[loan.slot];
  store(region_->descriptor(loan.slot), d);  // step 2
  slot.sent_ns.store(now, memory_order_relaxed);
  std::uint64_t expected = loan.word;
  if (!slot.word.compare_exchange_strong(expected, make_word(ticket, index(), State::Ready), memory_order_seq_cst)) {
    return Status::Stale;
  }
  took_part(kSends);
  count(Counter::Sent);
  signal(region_->control().items_event);  // step 4
  sweep(now);
  return Status::Ok;
}

Status FocusPort::cancel(const Loan& loan) noexcept {
  if (forks_ != fork_count()) return Status::Forked;
  const std::uint64_t ticket = region_->control().tickets.fetch_add(1, memory_order_acq_rel);
  std::uint64_t expected = loan.word;
  std::atomic<std::uint64_t>& word = region_->slots()[loan.slot].word;
  if (!word.compare_exchange_strong(expected, make_word(ticket, 0, State::Free), memory_order_seq_cst)) return Status::Stale;
  count(Counter::Cancelled);
  signal(region_->control().space_event);
  return Status::Ok;
}

// The READY slot with the smallest ticket; false when there is none.
bool FocusPort::oldest(std::uint32_t& at, std::uint64_t& word) const noexcept {
  const std::uint32_t slots = region_->geometry().slots;
  std::uint64_t least = kNoTicket;
  for (std::uint32_t i = 0; i < slots; ++i) {
    const std::uint64_t w = region_->slots()[i].word.load(memory_order_acquire);
    if (state_of(w) != State::Ready || ticket_of(w) >= least) continue;
    least = ticket_of(w);
    word = w;
    at = i;
  }
  return least != kNoTicket;
}

Status FocusPort::try_receive(Received& out) noexcept {
  std::uint64_t before = 0;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (const Status s = usable(); s != Status::Ok) return s;
    std::uint32_t at = 0;
    std::uint64_t word = 0;
    if (!oldest(at, word)) {  // step 1
      sweep(now_ns());
      return Status::Empty;
    }
    if (word != before) {  // step 2
      before = word;
      continue;
    }
    const std::uint64_t held = make_word(ticket_of(word), index(), State::Held);
    if (!region_->slots()[at].word.compare_exchange_strong(word, held, memory_order_seq_cst, memory_order_relaxed)) continue;  // step 3
    out.producer = owner_of(before);
    const std::uint64_t now = now_ns();
    const Status s = take(at, held, now, out);
    sweep(now);
    if (s != Status::Stale) return s;
  }
  return Status::Empty;
}

// Steps 4 and 5: the slot is HELD by us under `word`. Stale when its time was over (the slot is free again).
Status FocusPort::take(std::uint32_t slot, std::uint64_t word, std::uint64_t now, Received& out) noexcept {
  out.slot = slot;
  out.word = word;
  out.sent_ns = region_->slots()[slot].sent_ns.load(memory_order_relaxed);
  load(region_->descriptor(slot), out.descriptor);
  out.wrong = check(out.descriptor, slot, ticket_of(word), region_->geometry().slot_bytes);
  if (out.wrong || is_stale(out.descriptor, now)) {
    count(out.wrong ? Counter::Corrupt : Counter::Stale);
    release(slot, word);
    return out.wrong ? Status::Corrupt : Status::Stale;
  }
  took_part(kReceives);
  count(Counter::Received);
  note_latency(now > out.sent_ns ? now - out.sent_ns : 0);
  if (region_->geometry().per_producer) signal(region_->control().space_event);
  return Status::Ok;
}

Status FocusPort::claim(const Descriptor& wanted, Received& out) noexcept {
  if (const Status s = usable(); s != Status::Ok) return s;
  const std::uint32_t slot = wanted.id & 0xFFFF;
  const std::uint64_t ticket = wanted.id >> 16;
  if (slot >= region_->geometry().slots) return Status::Stale;
  std::atomic<std::uint64_t>& word = region_->slots()[slot].word;
  std::uint64_t w = word.load(memory_order_acquire);
  const std::uint64_t held = make_word(ticket, index(), State::Held);
  if (state_of(w) != State::Ready || ticket_of(w) != ticket) return Status::Stale;
  out.producer = owner_of(w);
  if (!word.compare_exchange_strong(w, held, memory_order_seq_cst, memory_order_relaxed)) return Status::Stale;
  return take(slot, held, now_ns(), out);
}

Status FocusPort::release(std::uint32_t slot, std::uint64_t word) noexcept {
  if (forks_ != fork_count()) return Status::Forked;
  std::uint64_t expected = word;
  std::atomic<std::uint64_t>& at = region_->slots()[slot].word;
  if (!at.compare_exchange_strong(expected, make_word(ticket_of(word), 0, State::Free), memory_order_seq_cst)) return Status::Stale;
  signal(region_->control().space_event);
  return Status::Ok;
}

bool FocusPort::items_ready() const noexcept {
  for (std::uint32_t i = 0; i < region_->geometry().slots; ++i) {
    if (state_of(region_->slots()[i].word.load(memory_order_seq_cst)) == State::Ready) return true;
  }
  return region_->control().removed.load(memory_order_seq_cst) != 0;
}

bool FocusPort::space_ready() const noexcept {
  const Geometry& g = region_->geometry();
  std::uint32_t mine = 0, free = 0;
  for (std::uint32_t i = 0; i < g.slots; ++i) {
    const std::uint64_t w = region_->slots()[i].word.load(memory_order_seq_cst);
    free += state_of(w) == State::Free;
    mine += owner_of(w) == index() && (state_of(w) == State::Loaned || state_of(w) == State::Ready);
  }
  if (free && (!g.per_producer || mine < g.per_producer)) return true;
  return region_->control().removed.load(memory_order_seq_cst) != 0;
}

Woken FocusPort::wait_items(std::uint64_t deadline, std::uint64_t spin_ns) const noexcept {
  return wait_event(region_->control().items_event, deadline, spin_ns, [this] { return items_ready(); });
}

Woken FocusPort::wait_space(std::uint64_t deadline, std::uint64_t spin_ns) const noexcept {
  return wait_event(region_->control().space_event, deadline, spin_ns, [this] { return space_ready(); });
}

}  // namespace sage_edge::mailbox
