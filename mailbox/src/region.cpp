// A port's file: created whole, checked before it is believed, mapped (LAYOUT.md sections 1 and 2).
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <new>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.hpp"

namespace sage_edge::mailbox {
namespace {

bool fail(Failure& failure, Status status, const char* format, ...) noexcept __attribute__((format(printf, 3, 4)));

// Notes what went wrong; always false, so that a function can end with it.
bool fail(Failure& failure, Status status, const char* format, ...) noexcept {
  failure.status = status;
  failure.number = errno;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(failure.message, sizeof failure.message, format, arguments);
  va_end(arguments);
  return false;
}

std::uint64_t pid_namespace() noexcept {
  struct stat info;
  return ::stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

class File {
 public:
  explicit File(int fd = -1) noexcept : fd_(fd) {}
  ~File() { reset(-1); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  void reset(int fd) noexcept {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
  }
  int get() const noexcept { return fd_; }

 private:
  int fd_;
};

void fill_header(Header& h, const Geometry& g, const Plan& p, const char* spec) noexcept {
  std::memset(static_cast<void*>(&h), 0, sizeof h);
  h.magic = kMagic;
  h.version = kVersion;
  h.kind = static_cast<std::uint32_t>(g.kind);
  h.memory = static_cast<std::uint32_t>(g.memory);
  h.participants = kParticipants;
  h.total_bytes = p.total_bytes;
  h.payload_offset = p.payload_offset;
  h.payload_bytes = p.payload_bytes;
  h.slots = g.slots;
  h.rings = g.rings;
  h.slot_bytes = g.slot_bytes;
  h.record_bytes = g.record_bytes;
  h.policy = static_cast<std::uint32_t>(g.policy);
  h.per_producer = g.per_producer;
  h.ttl_us = g.ttl_us;
  h.pid_namespace = pid_namespace();
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  h.created_ns = static_cast<std::uint64_t>(t.tv_sec) * 1'000'000'000ull + static_cast<std::uint64_t>(t.tv_nsec);
  h.spec_bytes = static_cast<std::uint32_t>(std::strlen(spec));
  h.flags = g.flags;
  std::memcpy(h.spec, spec, h.spec_bytes);
}

// A complete file that has no name yet, then its name. Returns false with errno EEXIST when somebody was quicker.
bool create_file(int directory, const char* name, const Geometry& g, const Plan& p, const char* spec, Failure& failure) noexcept {
  File file(::openat(directory, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (file.get() < 0 || ::fchmod(file.get(), 0600) != 0) {
    return fail(failure, Status::System, "cannot create a file in the namespace's directory");
  }
  if (const int error = ::posix_fallocate(file.get(), 0, static_cast<off_t>(p.total_bytes))) {
    errno = error;
    return fail(failure, Status::System, "cannot reserve %llu bytes of shared memory", static_cast<unsigned long long>(p.total_bytes));
  }
  Header header;
  fill_header(header, g, p, spec);
  const std::uint64_t first_ticket = 1;
  char link[40];
  std::snprintf(link, sizeof link, "/proc/self/fd/%d", file.get());
  if (::pwrite(file.get(), &header, sizeof header, 0) != sizeof header ||
      ::pwrite(file.get(), &first_ticket, sizeof first_ticket, kControlOffset) != sizeof first_ticket) {
    return fail(failure, Status::System, "cannot write the header");
  }
  return ::linkat(AT_FDCWD, link, directory, name, AT_SYMLINK_FOLLOW) == 0 ||
         fail(failure, Status::System, "cannot give the port its name");
}

}  // namespace

bool Region::read_header(int fd, Failure& failure) noexcept {
  struct stat info;
  if (::fstat(fd, &info) != 0) return fail(failure, Status::System, "fstat");
  inode_ = info.st_ino;
  if (!S_ISREG(info.st_mode) || info.st_uid != ::geteuid() || (info.st_mode & 0777) != 0600) {
    return fail(failure, Status::NotPrivate, "a regular file of user %u with permissions 0600 was expected, found user %u, mode %o",
                static_cast<unsigned>(::geteuid()), static_cast<unsigned>(info.st_uid), static_cast<unsigned>(info.st_mode));
  }
  Header& h = header_;
  if (info.st_size < static_cast<off_t>(sizeof h) || ::pread(fd, &h, sizeof h, 0) != sizeof h) {
    return fail(failure, Status::Mismatch, "a header of %zu bytes was expected, the file has %lld bytes", sizeof h,
                static_cast<long long>(info.st_size));
  }
  if (h.magic != kMagic) {
    return fail(failure, Status::Mismatch, "magic: %016llx was expected, the file has %016llx",
                static_cast<unsigned long long>(kMagic), static_cast<unsigned long long>(h.magic));
  }
  if (h.version != kVersion) {
    return fail(failure, Status::Mismatch, "layout version: this program has %u, the port has %u", kVersion, h.version);
  }
  geometry_ = {static_cast<Kind>(h.kind), static_cast<Memory>(h.memory), h.slots, h.rings, h.slot_bytes,
               h.record_bytes, static_cast<Policy>(h.policy), h.per_producer, h.ttl_us, h.flags};
  const char* wrong = plan(geometry_, plan_);
  if (!wrong && h.participants != kParticipants) wrong = "participants";
  if (!wrong && h.payload_offset != plan_.payload_offset) wrong = "payload_offset";
  if (!wrong && h.payload_bytes != plan_.payload_bytes) wrong = "payload_bytes";
  if (!wrong && (h.total_bytes != plan_.total_bytes || static_cast<std::uint64_t>(info.st_size) != plan_.total_bytes)) wrong = "total_bytes";
  if (!wrong && h.spec_bytes > kMaxSpecBytes) wrong = "spec_bytes";
  if (wrong) return fail(failure, Status::Mismatch, "%s: the header's value does not fit the layout", wrong);
  if (h.pid_namespace != pid_namespace()) {
    return fail(failure, Status::PidNamespace, "made in pid namespace %llu, this process is in %llu; share the pid namespace (--pid=host), or use another namespace of ports",
                static_cast<unsigned long long>(h.pid_namespace), static_cast<unsigned long long>(pid_namespace()));
  }
  std::memcpy(failure.found_spec, h.spec, h.spec_bytes);
  failure.found_spec[h.spec_bytes] = 0;
  return true;
}

bool Region::map(int fd, bool writable, Failure& failure) noexcept {
  // Populated: no page fault on the way of a tensor. A reader that only looks need not touch every page.
  void* base = ::mmap(nullptr, plan_.total_bytes, PROT_READ | (writable ? PROT_WRITE : 0),
                      MAP_SHARED | (writable && !(geometry_.flags & kFlagHugePages) ? MAP_POPULATE : 0), fd, 0);
  if (base == MAP_FAILED) return fail(failure, Status::System, "cannot map %llu bytes", static_cast<unsigned long long>(plan_.total_bytes));
  base_ = static_cast<std::uint8_t*>(base);
  payload_ = geometry_.memory == Memory::Vmm ? nullptr : base_ + plan_.payload_offset;
  if (geometry_.flags & kFlagHugePages && payload_) {
    huge_pages_ = ::madvise(payload_, plan_.payload_bytes, MADV_HUGEPAGE) == 0;
  }
  return true;
}

Region* Region::open(int directory_fd, const char* name, const Geometry& geometry, const char* spec, bool create, Failure& failure) noexcept {
  Plan wanted;
  if (const char* wrong = plan(geometry, wanted)) {
    fail(failure, Status::Mismatch, "%s: out of range", wrong);
    return nullptr;
  }
  if (std::strlen(spec) > kMaxSpecBytes || std::strlen(name) >= sizeof Region::name_) {
    fail(failure, Status::Mismatch, "name or spec too long");
    return nullptr;
  }
  for (int attempt = 0; attempt < 100; ++attempt) {  // again when the port was created or removed under our hands
    failure = Failure{};
    Region* region = attach(directory_fd, name, true, failure);
    if (!region && failure.number == ENOENT && failure.status == Status::System && create) {
      failure = Failure{};
      if (create_file(directory_fd, name, geometry, wanted, spec, failure) || failure.number == EEXIST) continue;
    }
    if (!region) return nullptr;
    if (region->control().removed.load(std::memory_order_acquire)) {
      region->remove();  // `rm` was killed half-way
      delete region;
      continue;
    }
    // The spec holds all that a person wrote; the geometry follows from it, unless the file was tampered with.
    const bool same = std::strcmp(failure.found_spec, spec) == 0;
    if (same && region->geometry_ == geometry) return region;
    fail(failure, Status::Mismatch, same ? "the header's numbers do not follow from its spec" : "the port was made with another spec");
    delete region;
    return nullptr;
  }
  fail(failure, Status::Removed, "created and removed again and again");
  return nullptr;
}

Region* Region::attach(int directory_fd, const char* name, bool writable, Failure& failure) noexcept {
  Region* region = new (std::nothrow) Region();
  if (!region) {
    errno = ENOMEM;
    fail(failure, Status::System, "out of memory");
    return nullptr;
  }
  std::strncpy(region->name_, name, sizeof region->name_ - 1);
  File file(::openat(directory_fd, name, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (file.get() < 0) {
    fail(failure, Status::System, "cannot open the port");
  } else if (region->read_header(file.get(), failure) && region->map(file.get(), writable, failure)) {
    region->directory_ = ::fcntl(directory_fd, F_DUPFD_CLOEXEC, 0);
    if (region->directory_ >= 0) return region;
    fail(failure, Status::System, "cannot keep the directory open");
  }
  delete region;
  return nullptr;
}

Region::~Region() {
  if (base_) ::munmap(base_, plan_.total_bytes);
  if (directory_ >= 0) ::close(directory_);
}

void Region::remove() noexcept {
  // The lock belongs to an open file description and ends with the process. Whoever unlinks holds it, and creating never
  // replaces: so the name cannot come to mean another file between the look and the unlink.
  File lock(::openat(directory_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (lock.get() >= 0) {
    while (::flock(lock.get(), LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  Control& c = control();
  c.removed.store(1, std::memory_order_seq_cst);
  signal_event(*this, c.items_event);
  signal_event(*this, c.space_event);
  struct stat info;
  if (::fstatat(directory_, name_, &info, AT_SYMLINK_NOFOLLOW) == 0 && info.st_ino == inode_) ::unlinkat(directory_, name_, 0);
}

void Region::fifo_name(char (&out)[160], std::uint32_t index, std::uint64_t identity) const noexcept {
  std::snprintf(out, sizeof out, ".wait.%s.%u.%llx", name_, index, static_cast<unsigned long long>(identity));
}

}  // namespace sage_edge::mailbox
