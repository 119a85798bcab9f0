// Event words: futex and FIFO (LAYOUT.md section 7).
#include <cerrno>
#include <cstdio>
#include <ctime>

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.hpp"

namespace sage_edge::mailbox {
namespace {

long futex(std::atomic<std::uint32_t>& word, int operation, std::uint32_t value, const timespec* timeout) noexcept {
  return ::syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), operation, value, timeout, nullptr, 0);
}

// A byte into the FIFO of every armed participant. Whoever is gone (ENXIO), or has bytes enough (EAGAIN), needs none.
void ring_fifos(Region& region) noexcept {
  for (std::uint32_t i = 0; i < kParticipants; ++i) {
    Participant& p = region.participant(i);
    if (!p.fifo_armed.load(std::memory_order_relaxed) || !p.fifo_armed.exchange(0, std::memory_order_acq_rel)) continue;
    char name[160];
    region.fifo_name(name, i, p.identity.load(std::memory_order_relaxed));
    const int fd = ::openat(region.directory(), name, O_WRONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) continue;
    struct stat info;
    if (::fstat(fd, &info) == 0 && S_ISFIFO(info.st_mode)) {
      const char byte = 1;
      const ssize_t written = ::write(fd, &byte, 1);
      (void)written;
    }
    ::close(fd);
  }
}

}  // namespace

std::uint32_t signal_event(Region& region, std::atomic<std::uint32_t>& event) noexcept {
  std::uint32_t e = event.load(std::memory_order_seq_cst);
  while (e & 3) {
    if (!event.compare_exchange_weak(e, (e & ~3u) + 4, std::memory_order_seq_cst)) continue;
    if (e & 1) futex(event, FUTEX_WAKE, 0x7FFFFFFF, nullptr);
    if (e & 2) ring_fifos(region);
    return 1;
  }
  return 0;
}

Woken sleep_on(std::atomic<std::uint32_t>& event, std::uint32_t expected, std::uint64_t deadline, std::uint64_t now) noexcept {
  const bool slice = deadline == kForever || deadline - now > kSliceNs;
  const std::uint64_t rest = slice ? kSliceNs : deadline - now;
  const timespec timeout{static_cast<time_t>(rest / 1'000'000'000ull), static_cast<long>(rest % 1'000'000'000ull)};
  if (futex(event, FUTEX_WAIT, expected, &timeout) == 0 || errno == EAGAIN) return Woken::Ready;
  if (errno == EINTR) return Woken::Interrupted;
  return slice ? Woken::Slice : Woken::Timeout;
}

int Port::open_fifo() noexcept {
  char name[160];
  region_->fifo_name(name, index(), identity_);
  ::unlinkat(region_->directory(), name, 0);
  if (::mkfifoat(region_->directory(), name, 0600) != 0) return -1;
  role_ |= kHasFifo;
  // Read and write: no end of file when the last writer closes, and opening does not wait for one.
  return ::openat(region_->directory(), name, O_RDWR | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
}

void Port::arm_fifo(bool space) noexcept {
  region_->participant(index()).fifo_armed.store(1, std::memory_order_seq_cst);
  std::atomic<std::uint32_t>& event = space ? region_->control().space_event : region_->control().items_event;
  event.fetch_or(2, std::memory_order_seq_cst);
}

}  // namespace sage_edge::mailbox
