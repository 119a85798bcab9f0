#include "sage_edge/mailbox/layout.hpp"

namespace sage_edge::mailbox {

const char* plan(const Geometry& g, Plan& out) noexcept {
  const bool focus = g.kind == Kind::Focus;
  if (!focus && g.kind != Kind::Broadcast) return "kind";
  if (g.memory != Memory::Shm && g.memory != Memory::ShmCuda && g.memory != Memory::Vmm) return "memory";
  if (g.slots < 1 || g.slots > kMaxSlots) return "slots";
  if (g.slot_bytes < 1 || g.slot_bytes > kMaxSlotBytes) return "slot_bytes";
  if (g.flags & ~kFlagHugePages) return "flags";
  std::uint64_t table_end = 0;
  std::uint64_t count = g.slots;
  if (focus) {
    if (g.slot_bytes % kPage) return "slot_bytes";
    if (g.rings != 0) return "rings";
    if (g.record_bytes != 0) return "record_bytes";
    if (g.policy < Policy::Block || g.policy > Policy::Refuse) return "policy";
    if (g.per_producer > g.slots) return "per_producer";
    out.descriptors_offset = round_up(kTableOffset + std::uint64_t{g.slots} * sizeof(Slot), kLine);
    table_end = out.descriptors_offset + std::uint64_t{g.slots} * sizeof(DescriptorWords);
  } else {
    if (g.slots < 2 || (g.slots & (g.slots - 1))) return "slots";
    if (g.rings < 1 || g.rings > kMaxRings) return "rings";
    if (g.record_bytes < 1 || g.record_bytes > kMaxRecordBytes) return "record_bytes";
    if (g.slot_bytes != round_up(sizeof(std::uint64_t) + round_up(g.record_bytes, 8), kLine)) return "slot_bytes";
    if (g.policy != Policy::None) return "policy";
    if (g.per_producer != 0) return "per_producer";
    if (g.ttl_us != 0) return "ttl_us";
    if (g.memory != Memory::Shm && g.memory != Memory::ShmCuda) return "memory";
    out.descriptors_offset = 0;
    table_end = kTableOffset + std::uint64_t{g.rings} * sizeof(Ring);
    count *= g.rings;
  }
  out.payload_offset = round_up(table_end, g.flags & kFlagHugePages ? kHugePage : kPage);
  out.payload_bytes = count * g.slot_bytes;  // at most 2^10 * 2^40: no overflow
  out.total_bytes = out.payload_offset + (g.memory == Memory::Vmm ? 0 : out.payload_bytes);
  return nullptr;
}

std::uint32_t item_bytes(std::uint8_t dtype) noexcept {
  switch (static_cast<DType>(dtype)) {
    case DType::Bool: case DType::Int8: case DType::UInt8: return 1;
    case DType::Int16: case DType::UInt16: case DType::Float16: case DType::BFloat16: return 2;
    case DType::Int32: case DType::UInt32: case DType::Float32: return 4;
    case DType::Int64: case DType::UInt64: case DType::Float64: case DType::Complex64: return 8;
    case DType::Complex128: return 16;
  }
  return 0;
}

const char* check(const Descriptor& d, std::uint32_t slot, std::uint64_t ticket, std::uint64_t slot_bytes) noexcept {
  if (d.id != (ticket << 16 | slot)) return "id";
  const std::uint64_t item = item_bytes(d.dtype);
  if (item == 0) return "dtype";
  const bool strided = d.ndim & kStrided;
  const std::uint32_t ndim = d.ndim & 0x7F;
  if (ndim > (strided ? kMaxStridedAxes : kMaxAxes)) return "ndim";
  // Elements from the first to behind the last; both factors stay below 2^40, so no product overflows.
  const std::uint64_t room = slot_bytes / item;
  std::uint64_t elements = 1;
  bool empty = false;
  for (std::uint32_t i = 0; i < ndim; ++i) empty |= d.extent[i] == 0;
  if (empty) return nullptr;
  for (std::uint32_t i = 0; i < ndim; ++i) {
    if (strided) {
      const std::uint64_t step = d.extent[kMaxStridedAxes + i];
      const std::uint64_t last = d.extent[i] - 1ull;
      if (step != 0 && last > room / step) return "strides";
      elements += last * step;
    } else {
      if (d.extent[i] > room / elements) return "shape";
      elements *= d.extent[i];
    }
  }
  return elements <= room ? nullptr : (strided ? "strides" : "shape");
}

}  // namespace sage_edge::mailbox
