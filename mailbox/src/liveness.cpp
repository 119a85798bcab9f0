// Who is dead: pid and start time from /proc (LAYOUT.md section 6).
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include "internal.hpp"

namespace sage_edge::mailbox {
namespace {

std::atomic<std::uint64_t> forks{0};

void count_fork() { forks.fetch_add(1, std::memory_order_relaxed); }

struct ForkWatch {
  ForkWatch() { pthread_atfork(nullptr, nullptr, count_fork); }
} fork_watch;

enum class Proc { Read, Absent, Unknown };

struct ProcStat {
  std::uint64_t pid, start_time, threads;
  char state;
};

// Fields of /proc/PID/stat (proc(5)): 1 pid, 2 (comm), 3 state, 20 num_threads, 22 starttime. comm may hold anything, so the
// last ')' counts.
Proc read_stat(const char* path, ProcStat& out) noexcept {
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT || errno == ESRCH ? Proc::Absent : Proc::Unknown;
  char text[1024];
  const ssize_t size = ::read(fd, text, sizeof text - 1);
  const int error = errno;
  ::close(fd);
  if (size <= 0) return size < 0 && error == ESRCH ? Proc::Absent : Proc::Unknown;
  text[size] = 0;
  char* cursor = std::strrchr(text, ')');
  if (!cursor || cursor[1] != ' ' || !cursor[2]) return Proc::Unknown;
  out.pid = std::strtoull(text, nullptr, 10);
  out.state = cursor[2];
  cursor += 3;
  for (int field = 4; field <= 22; ++field) {
    char* end = nullptr;
    const unsigned long long value = std::strtoull(cursor, &end, 10);  // negative fields wrap; none of ours is negative
    if (end == cursor) return Proc::Unknown;
    if (field == 20) out.threads = value;
    if (field == 22) out.start_time = value;
    cursor = end;
  }
  return Proc::Read;
}

}  // namespace

std::uint64_t now_ns() noexcept {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000'000ull + static_cast<std::uint64_t>(t.tv_nsec);
}

std::uint64_t fork_count() noexcept { return forks.load(std::memory_order_relaxed); }

std::uint64_t own_identity() noexcept {
  ProcStat stat;
  const auto pid = static_cast<std::uint64_t>(::getpid());
  if (read_stat("/proc/self/stat", stat) != Proc::Read || stat.pid != pid || pid >> 22) return 0;
  return make_identity(stat.start_time, pid);
}

bool is_dead(std::uint64_t identity) noexcept {
  char path[32] = "/proc/";
  char digits[12];
  int n = 0;
  for (std::uint32_t pid = pid_of(identity); pid || !n; pid /= 10) digits[n++] = static_cast<char>('0' + pid % 10);
  char* end = path + 6;
  while (n) *end++ = digits[--n];
  std::memcpy(end, "/stat", 6);
  ProcStat stat;
  switch (read_stat(path, stat)) {
    case Proc::Absent: return true;
    case Proc::Unknown: return false;  // out of descriptors, say: whoever is not known to be dead lives
    case Proc::Read: break;
  }
  if (make_identity(stat.start_time, stat.pid) != identity) return true;
  // A leader that called pthread_exit is a zombie while its other threads run.
  return (stat.state == 'Z' || stat.state == 'X' || stat.state == 'x') && stat.threads <= 1;
}

}  // namespace sage_edge::mailbox
