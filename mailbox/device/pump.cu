// Kernels that use the device side of the mailbox: what tests/gpu runs, what CI compiles for sm_87 and sm_90, and an example.
#include "sage_edge/mailbox/device.cuh"

using namespace sage_edge::mailbox::device;

// Takes `items` float32 tensors from `in`, sends each times `factor` through `out`; gives up after `patience` empty looks.
// One block. done[0]: items passed on, done[1]: the last result that was neither done nor nothing.
extern "C" __global__ void pump(Focus in, Focus out, float factor, u32 items, u32 patience, u64 now_ns, u64* done) {
  __shared__ Claim item, loan;
  __shared__ Descriptor descriptor;
  __shared__ int result;
  u32 passed = 0;
  for (u32 look = 0; passed < items && look < patience;) {
    if (threadIdx.x == 0) {
      result = try_loan(out, 65535, now_ns, loan);
      if (result == kDone) {
        result = try_pop(in, now_ns, item, descriptor);
        if (result != kDone) cancel(out, loan);
      }
    }
    __syncthreads();
    const int found = result;
    if (found != kDone) {
      if (threadIdx.x == 0 && found != kNothing) done[1] = found;
      ++look;
      __syncthreads();
      continue;
    }
    u64 elements = 1;
    for (u32 i = 0; i < (descriptor.ndim & 0x7Fu); ++i) elements *= descriptor.extent[i];
    const bool fits = descriptor.dtype == 11 && !(descriptor.ndim & kStrided) && elements * 4 <= out.slot_bytes;
    const float* from = reinterpret_cast<const float*>(item.data);
    float* to = reinterpret_cast<float*>(loan.data);
    if (fits)
      for (u64 i = threadIdx.x; i < elements; i += blockDim.x) to[i] = from[i] * factor;
    __syncthreads();
    if (threadIdx.x == 0) {
      Descriptor result_descriptor = descriptor;
      result_descriptor.event = 0;
      const int sent = fits ? push(out, loan, result_descriptor, now_ns) : cancel(out, loan);
      release(in, item);
      if (!fits || sent != kDone) done[1] = fits ? sent : kBad;
    }
    ++passed;
    __syncthreads();
  }
  if (threadIdx.x == 0) done[0] = passed;
}

constexpr u32 kRecordWords = 256 / 8;  // the largest record

// Publishes records whose first words are first, first + 1, ... into a ring. One thread.
extern "C" __global__ void publish(Ring ring, u64 first, u32 records, u64 now_ns) {
  u64 record[kRecordWords] = {};
  for (u32 i = 0; i < records; ++i) {
    record[0] = first + i;
    try_push(ring, record, now_ns);
  }
}

// Reads a ring until `limit` records are there or `patience` looks found none. One thread.
// out[0]: how many, out[1]: lost, then the first word of each.
extern "C" __global__ void collect(Ring ring, u64 cursor, u32 limit, u32 patience, u64* out) {
  u64 record[kRecordWords], got = 0, missed = 0, sent = 0;
  for (u32 look = 0; got < limit && look < patience;) {
    u64 lost = 0;
    const Result result = try_pop(ring, cursor, record, sent, lost);
    missed += lost;
    if (result == kDone) out[2 + got++] = record[0];
    else ++look;
  }
  out[0] = got;
  out[1] = missed;
}

// to[i] = from[i] * factor: a kernel that knows nothing of ports, for tensors that the host receives and sends around it.
extern "C" __global__ void scale(const float* from, float* to, float factor, u64 elements) {
  for (u64 i = blockIdx.x * u64{blockDim.x} + threadIdx.x; i < elements; i += u64{gridDim.x} * blockDim.x) to[i] = from[i] * factor;
}

// Keeps the device busy for about so many of its clock cycles, then writes `value`.
extern "C" __global__ void linger(float* to, float value, u64 elements, long long cycles) {
  const long long began = clock64();
  while (clock64() - began < cycles) {
  }
  for (u64 i = threadIdx.x; i < elements; i += blockDim.x) to[i] = value;
}
