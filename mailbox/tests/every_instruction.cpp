// SIGKILL after every single machine instruction of the mailbox's operations.
//
//   every_instruction DIRECTORY
//
// For k = 0, 1, 2, ...: a child opens the ports and stops; it is single-stepped (ptrace) k instructions into the operation at hand
// and killed there. Then this process, which has the ports open all the time, must find: nothing torn, every slot back after
// one operation, a port that works. Ends when the child gets through the operation alive. Prints one line per operation with
// the number of instructions; exit code 1 and a line on standard error at the first broken promise.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <fcntl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sage_edge/mailbox/mailbox.hpp"

using namespace sage_edge::mailbox;

namespace {

constexpr std::uint32_t kSlots = 3, kPattern = 512;
const Geometry kFocus{Kind::Focus, Memory::Shm, kSlots, 0, 4096, 0, Policy::DropOldest, 0, 0, 0};
const Geometry kRing{Kind::Broadcast, Memory::Shm, 4, 2, 64, 48, Policy::None, 0, 0, 0};

[[noreturn]] void broken(const char* what, long step) {
  std::fprintf(stderr, "after instruction %ld: %s\n", step, what);
  std::exit(1);
}

#define DEMAND(condition) \
  if (!(condition)) broken(#condition, step)

Descriptor tensor() {
  Descriptor d{};
  d.dtype = static_cast<std::uint8_t>(DType::UInt8);
  d.ndim = 1;
  d.device_type = 1;
  d.extent[0] = kPattern;
  return d;
}

struct Ports {
  Region *focus_region, *ring_region;
  FocusPort focus;
  BroadcastPort ring;
};

void open_ports(int directory, Ports& p) {
  Failure failure;
  p.focus_region = Region::open(directory, "focus", kFocus, "{}", true, failure);
  p.ring_region = Region::open(directory, "ring", kRing, "{}", true, failure);
  if (!p.focus_region || !p.ring_region || p.focus.open(*p.focus_region, "step") != Status::Ok ||
      p.ring.open(*p.ring_region, "step") != Status::Ok) {
    std::fprintf(stderr, "cannot open: %s\n", failure.message);
    std::exit(2);
  }
}

bool send_tensor(Ports& p, std::uint8_t value) {
  FocusPort::Loan loan;
  if (p.focus.try_loan(0xFFFF, loan) != Status::Ok) return false;
  std::memset(p.focus_region->payload(loan.slot), value, kPattern);
  Descriptor d = tensor();
  const char* wrong = nullptr;
  return p.focus.send(loan, d, wrong) == Status::Ok;
}

// Takes everything that waits; false when a payload is not of one piece.
bool drain(Ports& p, int& count) {
  FocusPort::Received r;
  Status s;
  while ((s = p.focus.try_receive(r)) == Status::Ok) {
    const std::uint8_t* data = p.focus_region->payload(r.slot);
    for (std::uint32_t i = 1; i < kPattern; ++i) {
      if (data[i] != data[0]) return false;
    }
    ++count;
    if (p.focus.release(r.slot, r.word) != Status::Ok) return false;
  }
  return s == Status::Empty;
}

bool drain_ring(Ports& p, int& count) {
  BroadcastPort::Received r;
  Status s;
  while ((s = p.ring.try_receive(r)) == Status::Ok) {
    for (int i = 1; i < 6; ++i) {
      if (r.words[i] != r.words[0]) return false;
    }
    ++count;
  }
  return s == Status::Empty;
}

// --- the operations, as the child does them between two stops

void send_one(Ports& p) { send_tensor(p, 0xA5); }

void cancel_one(Ports& p) {
  FocusPort::Loan loan;
  if (p.focus.try_loan(0, loan) == Status::Ok) p.focus.cancel(loan);
}

void receive_one(Ports& p) {
  FocusPort::Received r;
  if (p.focus.try_receive(r) == Status::Ok) p.focus.release(r.slot, r.word);
}

void broadcast_one(Ports& p) {
  std::uint64_t words[6] = {7, 7, 7, 7, 7, 7}, number;
  p.ring.send(words, number);
}

void read_one(Ports& p) {
  BroadcastPort::Received r;
  p.ring.try_receive(r);
}

void leave(Ports& p) {
  p.focus.leave();
  p.ring.leave();
}

struct Operation {
  const char* name;
  void (*act)(Ports&);
  int waiting;  // items before it
  bool sends;
};

// One child, killed `step` instructions into the operation. True: it came to the end before that.
bool kill_after(int directory, const Operation& operation, long step) {
  const pid_t child = ::fork();
  if (child == 0) {
    Ports own;  // on the stack, as is: the parent's handles are of no use here
    open_ports(directory, own);
    ::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    ::raise(SIGSTOP);
    operation.act(own);
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  if (!WIFSTOPPED(status)) {
    std::fprintf(stderr, "the child could not be traced\n");
    std::exit(77);
  }
  for (long i = 0; i < step && WIFSTOPPED(status); ++i) {
    if (::ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) std::exit(77);
    ::waitpid(child, &status, 0);
  }
  if (WIFEXITED(status)) return true;
  ::kill(child, SIGKILL);
  ::waitpid(child, &status, 0);
  return false;
}

void run(int directory, Ports& mine, const Operation& operation) {
  int none = 0, count = 0;
  long step = 0;
  bool finished = false;
  for (; !finished; ++step) {
    for (int i = 0; i < operation.waiting; ++i) DEMAND(send_tensor(mine, static_cast<std::uint8_t>(i + 1)));
    std::uint64_t words[6] = {3, 3, 3, 3, 3, 3}, number;
    DEMAND(mine.ring.send(words, number) == Status::Ok);
    finished = kill_after(directory, operation, step);
    // The next operation, at least 50 ms after the last sweep or urgent: here we sweep at once.
    mine.focus.sweep(now_ns(), 0);
    mine.ring.sweep(now_ns(), 0);
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      const std::uint64_t w = mine.focus_region->slots()[i].word.load();
      DEMAND(state_of(w) == State::Free || state_of(w) == State::Ready);
    }
    count = none = 0;
    DEMAND(drain(mine, count));
    DEMAND(count <= operation.waiting + operation.sends);
    DEMAND(drain_ring(mine, none));
    DEMAND(none >= 1 && none <= 2);
    std::uint32_t entries = 0;
    for (std::uint32_t i = 0; i < kParticipants; ++i) entries += mine.focus_region->participant(i).identity.load() != 0;
    DEMAND(entries == 1);
    DEMAND(send_tensor(mine, 9) && drain(mine, count));
    if (step > 20'000) broken("the operation does not end", step);
  }
  std::printf("%s: %ld instructions\n", operation.name, step);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const int directory = ::open(argv[1], O_RDONLY | O_DIRECTORY);
  static Ports mine;
  open_ports(directory, mine);
  const Operation operations[] = {
      {"loan and send", send_one, 0, true},
      {"loan by dropping the oldest, and send", send_one, kSlots, true},
      {"loan and cancel", cancel_one, 1, false},
      {"receive and release", receive_one, 2, false},
      {"broadcast", broadcast_one, 0, false},
      {"read a record", read_one, 0, false},
      {"leave", leave, 1, false},
  };
  for (const Operation& operation : operations) run(directory, mine, operation);
  mine.ring.leave();
  mine.focus.leave();
  return 0;
}
