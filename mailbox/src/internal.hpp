// Shared by the sources of the core; not installed.
#pragma once

#include "sage_edge/mailbox/mailbox.hpp"

namespace sage_edge::mailbox {

// Bits of Port::role_; the first two are shown to others.
constexpr std::uint32_t kSends = 1, kReceives = 2, kHasFifo = 4;

// Every failed attempt means that another party made a step; only one that scribbles in the memory makes so many.
constexpr int kAttempts = 10'000;

// Wait, steps 2 to 5 of LAYOUT.md section 7. `ready` must only look, with seq_cst loads.
template <class Ready>
Woken wait_event(std::atomic<std::uint32_t>& event, std::uint64_t deadline, std::uint64_t spin_ns, Ready ready) noexcept {
  const std::uint64_t start = now_ns();
  const std::uint64_t slice_end = start + kSliceNs;
  const std::uint64_t spin_end = spin_ns >= kSliceNs ? slice_end : start + spin_ns;
  std::uint64_t now = start;
  while (now < spin_end && now < deadline) {
    for (int i = 0; i < 8; ++i) {
      if (ready()) return Woken::Ready;
      pause_core();
    }
    now = now_ns();
  }
  if (now >= deadline) return ready() ? Woken::Ready : Woken::Timeout;
  if (now >= slice_end) return Woken::Slice;
  std::uint32_t e = event.load(std::memory_order_seq_cst);
  while (!(e & 1) && !event.compare_exchange_weak(e, e | 1, std::memory_order_seq_cst)) {
  }
  if (ready()) return Woken::Ready;
  return sleep_on(event, e | 1, deadline, now);
}

}  // namespace sage_edge::mailbox
