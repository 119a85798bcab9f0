#pragma once

#include "support.hpp"

namespace sage_edge::mailbox::python {

struct Record {
  BroadcastPort::Received received;
  nb::object dtype;
  std::uint32_t bytes;
};

class BroadcastHandle {
 public:
  explicit BroadcastHandle(nb::dict arguments);
  ~BroadcastHandle();
  BroadcastHandle(const BroadcastHandle&) = delete;
  BroadcastHandle& operator=(const BroadcastHandle&) = delete;

  std::uint64_t send(nb::handle record);
  nb::object receive(nb::handle timeout);
  nb::object latest();
  void close();
  bool closed() const { return closed_; }
  void require_open() const {
    if (closed_) raise(errors.closed, "port %s: is closed here; open it again", name.c_str());
  }

  BroadcastPort port;
  std::string name;
  nb::object dtype;
  std::uint64_t lost = 0;
  std::uint64_t spin_ns = 20'000;

 private:
  bool try_receive(nb::object& out);
  nb::object record(const BroadcastPort::Received& received);
  void shut();
  void back() {
    if (--waiting_ == 0 && closed_) shut();
  }

  std::unique_ptr<Region> region_;
  std::uint32_t waiting_ = 0;
  bool closed_ = false;
};

void bind_broadcast(nb::module_& m);

}  // namespace sage_edge::mailbox::python
