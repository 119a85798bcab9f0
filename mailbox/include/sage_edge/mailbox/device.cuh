// Device side of a port (LAYOUT.md, layout version 1): try_loan, push, try_pop, release, cancel on focus ports, try_push and
// try_pop on broadcast rings. Self-contained: compiles with nvcc and NVRTC, and with any C++17 compiler as host code, which is
// how it is tested on machines without a GPU (mailbox/tests/device_host.cpp; it also asserts every number against layout.hpp).
//
// Steps, orders and reasons are those of LAYOUT.md; the comments here name the step. Each call is made by one thread. A block
// that fills a payload together does so between __syncthreads() and lets one thread push: a barrier orders the others'
// writes before it, and release at system scope is cumulative, so the push publishes them all.
//
// Where it may run (section 9): slot words need compare-and-swap that CPU and GPU agree on, so focus functions only where
// cudaDevAttrHostNativeAtomicSupported says so. Rings need loads, stores and fences alone. A kernel acts in the name of one host
// handle that does nothing itself meanwhile; should the process die, what the kernel held comes back as from any dead process.
// Nobody is woken: after the kernel the host signals, or the waiters look by themselves within 50 ms.
//
// Memory model: PTX ISA, section "Memory Consistency Model"; the mapping from C++ orders is the one proven in Lustig et al.,
// ASPLOS 2019 (https://doi.org/10.1145/3297858.3304043): seq_cst = fence.sc before the access, which then is acquire or relaxed.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define SAGE_EDGE_DEVICE __device__ __forceinline__
#else
#define SAGE_EDGE_DEVICE inline
#endif

namespace sage_edge::mailbox::device {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(void*) == 8, "LP64 is assumed");

// --- atomics of system scope

#ifdef __CUDA_ARCH__
SAGE_EDGE_DEVICE u64 load_relaxed(const u64* at) {
  u64 value;
  asm volatile("ld.relaxed.sys.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
SAGE_EDGE_DEVICE u64 load_acquire(const u64* at) {
  u64 value;
  asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
SAGE_EDGE_DEVICE u32 load_relaxed(const u32* at) {
  u32 value;
  asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
SAGE_EDGE_DEVICE void store_relaxed(u64* at, u64 value) {
  asm volatile("st.relaxed.sys.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
SAGE_EDGE_DEVICE void fence_acquire_release() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
SAGE_EDGE_DEVICE void fence_sequential() { asm volatile("fence.sc.sys;" ::: "memory"); }
SAGE_EDGE_DEVICE bool swap_acquire_release(u64* at, u64 expected, u64 desired) {
  u64 found;
  asm volatile("atom.acq_rel.sys.cas.b64 %0, [%1], %2, %3;"
               : "=l"(found) : "l"(at), "l"(expected), "l"(desired) : "memory");
  return found == expected;
}
SAGE_EDGE_DEVICE u64 add_acquire_release(u64* at, u64 amount) {
  u64 before;
  asm volatile("atom.acq_rel.sys.add.u64 %0, [%1], %2;" : "=l"(before) : "l"(at), "l"(amount) : "memory");
  return before;
}
SAGE_EDGE_DEVICE void add_relaxed(u64* at, u64 amount) {
  asm volatile("red.relaxed.sys.add.u64 [%0], %1;" ::"l"(at), "l"(amount) : "memory");
}
#else
SAGE_EDGE_DEVICE u64 load_relaxed(const u64* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
SAGE_EDGE_DEVICE u64 load_acquire(const u64* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
SAGE_EDGE_DEVICE u32 load_relaxed(const u32* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
SAGE_EDGE_DEVICE void store_relaxed(u64* at, u64 value) { __atomic_store_n(at, value, __ATOMIC_RELAXED); }
SAGE_EDGE_DEVICE void fence_acquire_release() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
SAGE_EDGE_DEVICE void fence_sequential() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
SAGE_EDGE_DEVICE bool swap_acquire_release(u64* at, u64 expected, u64 desired) {
  return __atomic_compare_exchange_n(at, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
SAGE_EDGE_DEVICE u64 add_acquire_release(u64* at, u64 amount) { return __atomic_fetch_add(at, amount, __ATOMIC_ACQ_REL); }
SAGE_EDGE_DEVICE void add_relaxed(u64* at, u64 amount) { __atomic_fetch_add(at, amount, __ATOMIC_RELAXED); }
#endif
SAGE_EDGE_DEVICE bool swap_sequential(u64* at, u64 expected, u64 desired) {
  fence_sequential();
  return swap_acquire_release(at, expected, desired);
}

// --- what LAYOUT.md says, as numbers

enum : u32 { kFree = 0, kLoaned = 1, kReady = 2, kHeld = 3 };
enum : u32 { kBlock = 1, kDropOldest = 2, kDropLowestTrust = 3, kRefuse = 4 };
enum : u32 { kSent = 0, kReceived = 1, kDropped = 2, kStale = 3, kRefused = 4, kLost = 5, kCorrupt = 6, kCancelled = 8 };
constexpr u64 kTickets = 4096, kRemoved = 4288, kStatistics = 8448, kStatisticsBytes = 1024, kTable = 73984;
constexpr u64 kLastTicket = (1ull << 48) - 1;
constexpr u32 kMaxAxes = 8, kMaxStridedAxes = 4, kStrided = 0x80;
constexpr int kTurns = 64;  // lost races after which a call gives up: "try", not "wait"

SAGE_EDGE_DEVICE u64 make_word(u64 ticket, u32 owner, u32 state) { return ticket << 16 | u64{owner} << 8 | state; }
SAGE_EDGE_DEVICE u32 state_of(u64 word) { return static_cast<u32>(word & 0xFF); }
SAGE_EDGE_DEVICE u32 owner_of(u64 word) { return static_cast<u32>(word >> 8 & 0xFF); }
SAGE_EDGE_DEVICE u64 ticket_of(u64 word) { return word >> 16; }

struct Descriptor {
  u64 id, captured_ns;
  u32 ttl_us, tag;
  u16 trust, event;
  u8 dtype, ndim, device_type, device;
  u32 extent[8];
};
static_assert(sizeof(Descriptor) == 64, "a descriptor is one line");

enum Result : int {
  kDone = 0,
  kNothing = 1,   // nothing to receive, or no slot to loan
  kBad = 2,       // a descriptor, cursor or size that cannot be; the slot was freed
  kGone = 3,      // the port was removed, or its tickets are used up
};

// A focus port as a kernel sees it; passed by value. The host fills it from numbers that it has checked (make_focus).
struct Focus {
  u8* base;     // of the port's file in this address space
  u8* payload;  // of slot 0: base + payload_offset, or elsewhere (vmm)
  u64 slot_bytes;
  u32 slots, participant, policy, per_producer, ttl_us, reserved;
};

// A slot that this participant has loaned, or an item that it holds.
struct Claim {
  u64 word;
  u8* data;
  u32 slot;
};

SAGE_EDGE_DEVICE Focus make_focus(u8* base, u8* payload, u32 slots, u64 slot_bytes, u32 participant, u32 policy,
                                  u32 per_producer, u32 ttl_us) {
  return Focus{base, payload, slot_bytes, slots, participant, policy, per_producer, ttl_us, 0};
}
SAGE_EDGE_DEVICE u64* word_at(const Focus& port, u32 slot) {
  return reinterpret_cast<u64*>(port.base + kTable) + 2 * u64{slot};
}
SAGE_EDGE_DEVICE u64* descriptor_at(const Focus& port, u32 slot) {
  const u64 table = (kTable + u64{port.slots} * 16 + 63) / 64 * 64;
  return reinterpret_cast<u64*>(port.base + table) + 8 * u64{slot};
}
SAGE_EDGE_DEVICE void count(const Focus& port, u32 what) {
  add_relaxed(reinterpret_cast<u64*>(port.base + kStatistics + u64{port.participant} * kStatisticsBytes) + what, 1);
}
SAGE_EDGE_DEVICE bool removed(const u8* base) { return load_relaxed(reinterpret_cast<const u32*>(base + kRemoved)) != 0; }

SAGE_EDGE_DEVICE u32 item_bytes(u32 dtype) {
  switch (dtype) {
    case 1: case 2: case 6: return 1;
    case 3: case 7: case 10: case 15: return 2;
    case 4: case 8: case 11: return 4;
    case 5: case 9: case 12: case 13: return 8;
    case 14: return 16;
    default: return 0;
  }
}

// Is this descriptor possible for this slot? Shared memory may hold anything: sizes are checked before they are used.
SAGE_EDGE_DEVICE bool possible(const Descriptor& d, u32 slot, u64 ticket, u64 slot_bytes) {
  const u64 item = item_bytes(d.dtype);
  const bool strided = d.ndim & kStrided;
  const u32 axes = d.ndim & 0x7F;
  if (d.id != (ticket << 16 | slot) || item == 0 || axes > (strided ? kMaxStridedAxes : kMaxAxes)) return false;
  for (u32 i = 0; i < axes; ++i)
    if (d.extent[i] == 0) return true;
  const u64 room = slot_bytes / item;
  u64 elements = 1;
  for (u32 i = 0; i < axes; ++i) {
    if (strided) {
      const u64 step = d.extent[kMaxStridedAxes + i], last = d.extent[i] - 1ull;
      if (step != 0 && last > room / step) return false;
      elements += last * step;
    } else {
      if (d.extent[i] > room / elements) return false;
      elements *= d.extent[i];
    }
  }
  return elements <= room;
}

SAGE_EDGE_DEVICE bool stale(u64 captured_ns, u32 ttl_us, u64 now_ns) {
  return ttl_us != 0 && now_ns > captured_ns && now_ns - captured_ns > u64{ttl_us} * 1000;
}

// --- focus

// Loan, without waiting: a free slot, else one that is stale, else what the policy drops. trust: of the new item, 0..65535.
// now_ns: CLOCK_MONOTONIC as the host last told it (device clocks differ), or 0 to let nothing be stale.
SAGE_EDGE_DEVICE Result try_loan(const Focus& port, u32 trust, u64 now_ns, Claim& out) {
  if (removed(port.base)) return kGone;
  for (int turn = 0; turn < kTurns; ++turn) {
    u32 own = 0, slot = port.slots, displaced = kSent;
    u64 chosen = 0;
    for (u32 i = 0; i < port.slots; ++i) {
      const u64 word = load_relaxed(word_at(port, i));
      const u32 state = state_of(word);
      own += (state == kLoaned || state == kReady) && owner_of(word) == port.participant;
      if (state == kFree && slot == port.slots) { slot = i; chosen = word; }
    }
    const bool capped = port.per_producer != 0 && own >= port.per_producer;
    if (capped || slot == port.slots) {
      // Of the waiting items (with the cap reached: of one's own) the stale first, then by policy. Trust and ticket make one
      // number, so that the least is the least trusted and, of equals, the oldest. What is read here of an item that others may
      // take counts only if the swap below succeeds.
      const bool drops = port.policy == kDropOldest || port.policy == kDropLowestTrust;
      u64 least = ~0ull;
      slot = port.slots;
      for (u32 i = 0; i < port.slots; ++i) {
        const u64 word = load_acquire(word_at(port, i));
        if (state_of(word) != kReady || (capped && owner_of(word) != port.participant)) continue;
        const u64* descriptor = descriptor_at(port, i);
        const u64 times = load_relaxed(descriptor + 2), trusted = load_relaxed(descriptor + 3) & 0xFFFF;
        u64 rank = ticket_of(word);
        if (now_ns && stale(load_relaxed(descriptor + 1), static_cast<u32>(times), now_ns)) rank = 0;
        else if (!drops) continue;
        else if (port.policy == kDropLowestTrust) {
          if (trusted > trust) continue;
          rank |= trusted << 48;
        }
        if (rank < least) { least = rank; slot = i; chosen = word; }
      }
      displaced = least == 0 ? kStale : kDropped;
      if (slot == port.slots) {
        count(port, kRefused);
        return kNothing;
      }
    }
    const u64 loaned = make_word(ticket_of(chosen), port.participant, kLoaned);
    if (swap_acquire_release(word_at(port, slot), chosen, loaned)) {
      if (displaced != kSent) count(port, displaced);
      fence_acquire_release();  // Loan 1: a tap that sees a byte of the new payload also sees LOANED
      out = Claim{loaned, port.payload + u64{slot} * port.slot_bytes, slot};
      return kDone;
    }
  }
  return kNothing;
}

// Send: hands the loan over. `id` and, where 0, `captured_ns` and `ttl_us` of the descriptor are filled in here. kBad: not sent
// and still loaned, since the descriptor is not possible for the slot; cancel it.
SAGE_EDGE_DEVICE Result push(const Focus& port, const Claim& loan, Descriptor descriptor, u64 now_ns) {
  const u64 ticket = add_acquire_release(reinterpret_cast<u64*>(port.base + kTickets), 1);  // Send 1
  if (ticket > kLastTicket) return kGone;
  descriptor.id = ticket << 16 | loan.slot;
  if (descriptor.captured_ns == 0) descriptor.captured_ns = now_ns;
  if (descriptor.ttl_us == 0) descriptor.ttl_us = port.ttl_us;
  if (!possible(descriptor, loan.slot, ticket, port.slot_bytes)) return kBad;
  const u64* words = reinterpret_cast<const u64*>(&descriptor);
  u64* to = descriptor_at(port, loan.slot);
  for (u32 i = 0; i < 8; ++i) store_relaxed(to + i, words[i]);  // Send 2
  store_relaxed(word_at(port, loan.slot) + 1, now_ns);
  const u64 ready = make_word(ticket, port.participant, kReady);
  if (!swap_sequential(word_at(port, loan.slot), loan.word, ready)) return kBad;  // Send 3
  count(port, kSent);
  return kDone;
}

// Cancel: the slot goes back unsent, with a new ticket.
SAGE_EDGE_DEVICE Result cancel(const Focus& port, const Claim& loan) {
  const u64 ticket = add_acquire_release(reinterpret_cast<u64*>(port.base + kTickets), 1);
  if (!swap_sequential(word_at(port, loan.slot), loan.word, make_word(ticket, 0, kFree))) return kBad;
  count(port, kCancelled);
  return kDone;
}

// Release: gives a held item back.
SAGE_EDGE_DEVICE Result release(const Focus& port, const Claim& item) {
  const u64 free = make_word(ticket_of(item.word), 0, kFree);
  return swap_sequential(word_at(port, item.slot), item.word, free) ? kDone : kBad;
}

// Receive, without waiting: the oldest item. kBad: it was impossible and has been freed and counted; try again.
SAGE_EDGE_DEVICE Result try_pop(const Focus& port, u64 now_ns, Claim& out, Descriptor& descriptor) {
  if (removed(port.base)) return kGone;
  u64 before = 0;
  for (int turn = 0; turn < kTurns; ++turn) {
    u64 oldest = ~0ull, chosen = 0;
    u32 slot = 0;
    for (u32 i = 0; i < port.slots; ++i) {
      const u64 word = load_acquire(word_at(port, i));
      if (state_of(word) == kReady && ticket_of(word) < oldest) { oldest = ticket_of(word); slot = i; chosen = word; }
    }
    if (oldest == ~0ull) return kNothing;  // Receive 1
    if (chosen != before) {                // Receive 2: the same in two looks, one after the other
      before = chosen;
      continue;
    }
    const u64 held = make_word(oldest, port.participant, kHeld);
    if (!swap_sequential(word_at(port, slot), chosen, held)) continue;  // Receive 3
    u64* words = reinterpret_cast<u64*>(&descriptor);
    for (u32 i = 0; i < 8; ++i) words[i] = load_relaxed(descriptor_at(port, slot) + i);  // Receive 4
    const Claim item{held, port.payload + u64{slot} * port.slot_bytes, slot};
    const bool sound = possible(descriptor, slot, oldest, port.slot_bytes);
    if (sound && !stale(descriptor.captured_ns, descriptor.ttl_us, now_ns)) {
      count(port, kReceived);
      out = item;
      return kDone;
    }
    release(port, item);
    count(port, sound ? kStale : kCorrupt);
    if (!sound) return kBad;
  }
  return kNothing;
}

// --- broadcast

// One producer's ring as a kernel sees it; passed by value. The host fills it from numbers that it has checked (make_ring).
struct Ring {
  u8* base;
  u64* head;
  u8* cells;
  u64 cell_bytes;
  u32 slots, record_bytes, participant, reserved;
};

SAGE_EDGE_DEVICE Ring make_ring(u8* base, u32 rings, u32 ring, u32 slots, u64 cell_bytes, u32 record_bytes, u32 participant) {
  const u64 cells = (kTable + u64{rings} * 64 + 4095) / 4096 * 4096;
  return Ring{base, reinterpret_cast<u64*>(base + kTable + u64{ring} * 64 + 8), base + cells + u64{ring} * slots * cell_bytes,
              cell_bytes, slots, record_bytes, participant, 0};
}
SAGE_EDGE_DEVICE u64* cell_at(const Ring& ring, u64 number) {
  return reinterpret_cast<u64*>(ring.cells + (number & (ring.slots - 1)) * ring.cell_bytes);
}
SAGE_EDGE_DEVICE u32 record_words(const Ring& ring) { return (ring.record_bytes + 7) / 8; }
SAGE_EDGE_DEVICE void tally(const Ring& ring, u32 what, u64 amount) {
  // Load and store: one thread of one owner writes here, and no native atomics are asked of the device.
  u64* at = reinterpret_cast<u64*>(ring.base + kStatistics + u64{ring.participant} * kStatisticsBytes) + what;
  store_relaxed(at, load_relaxed(at) + amount);
}

// Publish a record of record_words(ring) words into the ring that this process's handle owns. Never waits.
SAGE_EDGE_DEVICE Result try_push(const Ring& ring, const u64* record, u64 now_ns) {
  if (removed(ring.base)) return kGone;
  const u64 number = load_relaxed(ring.head);  // Write 1
  fence_acquire_release();                     // Write 2
  u64* cell = cell_at(ring, number);
  store_relaxed(cell, now_ns);  // Write 3
  for (u32 i = 0; i < record_words(ring); ++i) store_relaxed(cell + 1 + i, record[i]);
  fence_sequential();  // Write 4: a release too
  store_relaxed(ring.head, number + 1);
  fence_sequential();  // what signals afterwards looks at the event word after this store
  tally(ring, kSent, 1);
  return kDone;
}

// The record at `cursor`, or the oldest that is still there; moves the cursor behind it. lost: how many were overwritten before it.
SAGE_EDGE_DEVICE Result try_pop(const Ring& ring, u64& cursor, u64* record, u64& sent_ns, u64& lost) {
  if (removed(ring.base)) return kGone;
  lost = 0;
  for (int turn = 0; turn < kTurns; ++turn) {
    const u64 head = load_acquire(ring.head);  // Read 1
    if (head == cursor) break;
    if (head < cursor) return kBad;
    const u64 readable = ring.slots - 1;
    if (head - cursor > readable) {  // Read 2
      lost += head - cursor - readable;
      cursor = head - readable;
    }
    const u64* cell = cell_at(ring, cursor);
    sent_ns = load_relaxed(cell);  // Read 3
    for (u32 i = 0; i < record_words(ring); ++i) record[i] = load_relaxed(cell + 1 + i);
    fence_acquire_release();                                     // Read 4
    if (load_relaxed(ring.head) - cursor > readable) continue;   // Read 5
    ++cursor;
    tally(ring, kReceived, 1);
    if (lost) tally(ring, kLost, lost);
    return kDone;
  }
  if (lost) tally(ring, kLost, lost);
  return kNothing;
}

}  // namespace sage_edge::mailbox::device
