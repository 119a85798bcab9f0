// The focus port as Python sees it: FocusPort, Loan, Item.
#pragma once

#include <vector>

#include "tensor.hpp"

namespace sage_edge::mailbox::python {

struct ArrayPair {
  PyObject *hold = nullptr, *array = nullptr;
  void clear() {
    Py_CLEAR(array);
    Py_CLEAR(hold);
  }
};

constexpr std::uint8_t kDeviceMemory = 2;  // DLPack's kDLCUDA

class FocusHandle {
 public:
  explicit FocusHandle(nb::dict arguments);
  ~FocusHandle();
  FocusHandle(const FocusHandle&) = delete;
  FocusHandle& operator=(const FocusHandle&) = delete;

  nb::object loan(nb::handle self, nb::handle shape, nb::handle dtype, double trust, nb::handle timeout);
  nb::object receive(nb::handle self, nb::handle timeout);
  nb::object claim(nb::handle self, nb::bytes descriptor);
  void close();
  bool closed() const { return closed_; }

  // Loans, items and views that still refer to the mapping. It goes with the last of them.
  void pin() { ++pins_; }
  bool pinned() const { return pins_ != 0; }
  void unpin() {
    if (--pins_ == 0 && closed_) shut();
  }
  void give_back(std::uint32_t slot, std::uint64_t word, bool held) {
    if (held) {
      port.release(slot, word);
    } else {
      port.cancel({slot, word});
    }
  }
  // A hold and an array over a slot: those of its last use when nobody refers to them and they fit, else new ones. Both
  // references are the caller's. Throws.
  ArrayPair take_arrays(std::uint32_t slot, const Descriptor& descriptor, bool writable);
  void keep_arrays(std::uint32_t slot, const ArrayPair& pair);  // steals both references
  std::uint8_t* payload(std::uint32_t slot) const { return port.region().payload(slot); }
  std::uint64_t device_address(std::uint32_t slot) const {
    return device_base ? device_base + (payload(slot) - port.region().base()) : 0;
  }
  void require_open() const {
    if (closed_) raise(errors.closed, "port %s: is closed here; open it again", name.c_str());
  }
  // Dtype and shape against the port's: of what came, whose sender is broken then, and of what is to be sent from here.
  void check_item(const Descriptor& descriptor) const;
  void check_own(const Descriptor& descriptor, const char* doing) const;

  FocusPort port;
  std::string name;
  std::uint64_t spin_ns = 20'000;
  std::uint64_t device_base = 0;  // where a device sees the mapping; 0: not at all
  std::uint8_t device_type = 1, device = 0;

 private:
  void shut();
  void fill_shape(nb::handle shape, Descriptor& descriptor) const;
  bool try_receive(nb::handle self, nb::object& out);
  const char* misfit(const Descriptor& descriptor) const;  // "dtype", "shape" or nullptr

  std::unique_ptr<Region> region_;
  Descriptor spec_{};        // dtype 0: any; extents 0: any
  bool spec_shaped_ = false;  // the port fixes the number of axes
  bool shape_fixed_ = false;  // and the length of each
  PyObject* last_dtype_ = nullptr;
  int last_code_ = 0;
  std::vector<ArrayPair> kept_;
  std::uint32_t pins_ = 0;
  bool closed_ = false;
};

// What Loan and Item have in common: a slot that is theirs until they end.
class SlotHandle {
 public:
  SlotHandle(nb::handle port_object, FocusHandle& port, std::uint32_t slot, std::uint64_t word, const Descriptor& descriptor)
      : descriptor(descriptor), slot(slot), word_(word), port_(&port), port_object_(port_object.inc_ref().ptr()) {
    port.pin();
  }
  SlotHandle(const SlotHandle&) = delete;
  SlotHandle& operator=(const SlotHandle&) = delete;

  bool active() const { return port_ != nullptr; }
  std::uint64_t generation() const { return descriptor.id >> 16; }
  nb::object array(bool writable);
  nb::object host_array(bool writable);  // what Python may touch: InputError where the CPU cannot read
  nb::object dlpack(bool writable, nb::handle stream, nb::handle max_version, nb::handle dl_device, nb::handle copy);
  nb::dict cuda_interface(bool writable);

  Descriptor descriptor;
  std::uint32_t slot;

 protected:
  FocusHandle& require_active(const char* what) const;
  bool views_alive() const;
  // Ends the handle. With views alive the duty goes over to the hold; else it is `false` and the caller has done it already or does it now.
  bool end(Hold::Duty duty);

  std::uint64_t word_;
  FocusHandle* port_;
  PyObject* port_object_;
  ArrayPair arrays_;
};

class Loan : public SlotHandle {
 public:
  Loan(nb::handle port_object, FocusHandle& port, const FocusPort::Loan& loan, const Descriptor& descriptor)
      : SlotHandle(port_object, port, loan.slot, loan.word, descriptor) {}
  ~Loan() {
    if (active()) end(Hold::Duty::Cancel);
  }
  std::uint64_t send(nb::handle view, std::uint32_t tag, nb::handle trust, nb::handle captured_ns, nb::handle ttl_ms, std::uint16_t event);
  void cancel();
};

class Item : public SlotHandle {
 public:
  Item(nb::handle port_object, FocusHandle& port, const FocusPort::Received& r)
      : SlotHandle(port_object, port, r.slot, r.word, r.descriptor), sent_ns(r.sent_ns), producer(r.producer) {}
  ~Item() {
    if (active()) end(Hold::Duty::Release);
  }
  bool release();

  std::uint64_t sent_ns;
  std::uint32_t producer;
};

std::uint16_t trust_code(double trust);
std::uint32_t ttl_code(nb::handle milliseconds, std::uint32_t fallback);
void bind_focus(nb::module_& m);

}  // namespace sage_edge::mailbox::python
