// Threads with a handle each on one mapping, for ThreadSanitizer: it knows addresses, so all must share them.
//
//   threads DIRECTORY ITEMS
//
// Producers fill tensors with plain stores, consumers check and sum them with plain loads: whatever the slot words do not order is
// a data race that the sanitizer reports. Besides: every item arrives once, in its producer's order. A tap reads no payload here
// (its copy of memory that may be written meanwhile is thrown away, which no sanitizer can know).
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include <fcntl.h>

#include "sage_edge/mailbox/mailbox.hpp"

using namespace sage_edge::mailbox;

namespace {

constexpr std::uint32_t kProducers = 2, kConsumers = 2, kWords = 64;
const Geometry kFocus{Kind::Focus, Memory::Shm, 4, 0, 4096, 0, Policy::Block, 3, 0, 0};
const Geometry kRing{Kind::Broadcast, Memory::Shm, 8, kProducers, 64, 48, Policy::None, 0, 0, 0};

std::atomic<std::uint64_t> received{0};
std::atomic<bool> failed{false};

void fail(const char* text) {
  if (!failed.exchange(true)) std::fprintf(stderr, "%s\n", text);
}

void produce(Region& focus_region, Region& ring_region, std::uint32_t who, std::uint64_t items) {
  FocusPort focus;
  BroadcastPort ring;
  if (focus.open(focus_region, "producer") != Status::Ok || ring.open(ring_region, "producer") != Status::Ok) return fail("open");
  for (std::uint64_t n = 1; n <= items && !failed; ++n) {
    FocusPort::Loan loan;
    Status s = Status::Full;
    while (!failed && ((s = focus.try_loan(0xFFFF, loan)) == Status::Full || s == Status::Capped)) {
      focus.wait_space(now_ns() + 100'000'000, 1'000);
    }
    if (failed) return;
    if (s != Status::Ok) return fail("loan");
    if (n % 16 == 0) {
      if (focus.cancel(loan) != Status::Ok) return fail("cancel");
      if ((s = focus.try_loan(0xFFFF, loan)) != Status::Ok) {
        while (!failed && (s == Status::Full || s == Status::Capped)) {
          focus.wait_space(now_ns() + 100'000'000, 1'000);
          s = focus.try_loan(0xFFFF, loan);
        }
        if (failed) return;
      }
    }
    auto* words = reinterpret_cast<std::uint64_t*>(focus_region.payload(loan.slot));
    for (std::uint32_t i = 0; i < kWords; ++i) words[i] = n;
    Descriptor d{};
    d.dtype = static_cast<std::uint8_t>(DType::UInt64);
    d.ndim = 1;
    d.device_type = 1;
    d.extent[0] = kWords;
    d.tag = who;
    const char* wrong = nullptr;
    if (focus.send(loan, d, wrong) != Status::Ok) return fail("send");
    std::uint64_t record[6], number;
    for (std::uint64_t& word : record) word = n;
    if (ring.send(record, number) != Status::Ok) return fail("broadcast");
  }
  focus.leave();
  ring.leave();
}

void consume(Region& focus_region, Region& ring_region, std::uint64_t total) {
  FocusPort focus;
  BroadcastPort ring;
  if (focus.open(focus_region, "consumer") != Status::Ok || ring.open(ring_region, "consumer") != Status::Ok) return fail("open");
  std::uint64_t last[kProducers] = {};
  while (received.load() < total && !failed) {
    FocusPort::Received r;
    const Status s = focus.try_receive(r);
    if (s == Status::Ok) {
      const auto* words = reinterpret_cast<const std::uint64_t*>(focus_region.payload(r.slot));
      for (std::uint32_t i = 1; i < kWords; ++i) {
        if (words[i] != words[0]) return fail("a torn tensor");
      }
      const std::uint32_t who = r.descriptor.tag;
      if (who >= kProducers || words[0] <= last[who]) return fail("out of order");
      last[who] = words[0];
      if (focus.release(r.slot, r.word) != Status::Ok) return fail("release");
      received.fetch_add(1);
    } else if (s == Status::Empty) {
      focus.wait_items(now_ns() + 20'000'000, 1'000);
    } else {
      return fail("receive");
    }
    BroadcastPort::Received record;
    while (ring.try_receive(record) == Status::Ok) {
      for (int i = 1; i < 6; ++i) {
        if (record.words[i] != record.words[0]) return fail("a torn record");
      }
    }
    ring.latest(record);
  }
  focus.leave();
  ring.leave();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int directory = ::open(argv[1], O_RDONLY | O_DIRECTORY);
  const std::uint64_t items = std::strtoull(argv[2], nullptr, 10);
  Failure failure;
  Region* focus = Region::open(directory, "focus", kFocus, "{}", true, failure);
  Region* ring = Region::open(directory, "ring", kRing, "{}", true, failure);
  if (!focus || !ring) {
    std::fprintf(stderr, "cannot open: %s\n", failure.message);
    return 2;
  }
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < kProducers; ++i) threads.emplace_back([=] { produce(*focus, *ring, i, items); });
  for (std::uint32_t i = 0; i < kConsumers; ++i) threads.emplace_back([=] { consume(*focus, *ring, items * kProducers); });
  for (std::thread& thread : threads) thread.join();
  for (std::uint32_t i = 0; i < kFocus.slots; ++i) {
    if (state_of(focus->slots()[i].word.load()) != State::Free) fail("a slot is not free at the end");
  }
  std::printf("%llu items\n", static_cast<unsigned long long>(received.load()));
  delete focus;
  delete ring;
  return failed ? 1 : 0;
}
