#include "cuda/emulator/simt.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#include "cuda/emulator/async_products.h"
#include "cuda/emulator/block.h"
#include "cuda/emulator/segfault.h"
#include "cuda/emulator/traffic.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace prunekernels::simt {

Block block;

namespace {

const std::function<void()>* kernel;

// Run blocks, warps and lanes from the last to the first: results must not depend on their order.
const bool backwards = std::getenv("PRUNEKERNELS_EMULATE_BACKWARDS") != nullptr;

Thread& take_ready(int w) {
  Warp& warp = block.warps[w];
  const int lane = backwards ? 31 - __builtin_clz(warp.ready) : __builtin_ctz(warp.ready);
  warp.ready &= ~(1u << lane);
  Thread& next = block.threads[w * kLanes + lane];
  block.self = &next;
  threadIdx = next.index;
  return next;
}

void run_thread() {
  entered();
  (*kernel)();
  block.self->at = Thread::At::exit;
  ++block.returned;
  leave();
}

void begin_block() {
  block.begun = block.barrier = block.now++;
  block.at_barrier = block.returned = 0;
  begin_products();
  for (int w = 0; w < block.warp_count; ++w) {
    const int lanes = block.thread_count - w * kLanes;
    const uint32_t exist = lanes >= kLanes ? kAllLanes : (1u << lanes) - 1;
    block.warps[w] = {exist, exist, 0};
  }
  for (int i = 0; i < block.thread_count; ++i) {
    Thread& thread = block.threads[i];
    thread.at = Thread::At::running;
    thread.copies.clear();
    thread.groups = 0;
    thread.proxy_fences = 0;
    std::memset(thread.knows, 0, sizeof(thread.knows));
    prepare(thread.fiber, i, run_thread);
  }
}

std::string whereabouts(const Thread& thread) {
  if (thread.at == Thread::At::exit) return "has returned";
  if (thread.at == Thread::At::barrier) return "waits at a barrier of the block";
  char text[96];
  std::snprintf(text, sizeof(text), "is at %s of mask 0x%08x", thread.collective.name, thread.mask);
  return text;
}

// Reports why the block is stuck: no thread is ready, and not all have returned.
void note_stuck() {
  char what[256];
  for (int i = 0; i < block.thread_count; ++i) {
    Thread& thread = block.threads[i];
    if (thread.at == Thread::At::barrier) block.self = &thread;
    if (thread.at != Thread::At::collective) continue;
    for (uint32_t left = thread.mask; left; left &= left - 1) {
      const Thread& other = block.lanes_of(thread)[__builtin_ctz(left)];
      if (other.at == Thread::At::collective && other.mask == thread.mask && other.collective == thread.collective)
        continue;
      std::snprintf(what, sizeof(what), "%s entered by only part of its mask 0x%08x: lane %d %s",
                    thread.collective.name, thread.mask, other.lane(), whereabouts(other).c_str());
      block.self = &thread;
      return note_failure(what);
    }
  }
  std::snprintf(what, sizeof(what), "barrier not reached by all threads: %d of %d wait there, %d have returned",
                block.at_barrier, block.thread_count, block.returned);
  note_failure(what);
}

void run_block() {
  begin_block();
  for (bool ran = true; ran;) {
    ran = false;
    for (int i = 0; i < block.warp_count; ++i) {
      const int w = backwards ? block.warp_count - 1 - i : i;
      if (!block.warps[w].ready) continue;
      ran = true;
      switch_to(block.scheduler, take_ready(w).fiber);
      if (failed()) return;
    }
  }
  if (block.returned != block.thread_count) return note_stuck();
  if (are_products_left()) note_failure("wgmma: products that the block has not waited for");
  if (traffic::on) traffic::end_of_block();
}

void run_grid() {
  const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
  for (uint64_t i = 0; i < blocks && !failed(); ++i) {
    const uint64_t b = backwards ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                static_cast<unsigned>(b / gridDim.x / gridDim.y)};
    run_block();
  }
}

const char* why_refused(dim3 grid, dim3 shape, size_t shared_bytes) {
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return "grid beyond (2^31 - 1, 65535, 65535)";
  const uint64_t threads = static_cast<uint64_t>(shape.x) * shape.y * shape.z;
  if (threads == 0 || threads > kMaxThreads || shape.z > 64)
    return "block of no threads, beyond 1024 threads or z > 64";
  if (shared_bytes > kMaxSharedBytes) return "more than 227 KB of shared memory";
  return nullptr;
}

}  // namespace

void leave() {
  Thread& self = *block.self;
  if (block.warps[self.warp()].ready)
    switch_to(self.fiber, take_ready(self.warp()).fiber);
  else
    switch_to(self.fiber, block.scheduler);
}

cudaError_t run(dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (failed()) return cudaErrorLaunchFailure;  // as on the device, launches after a failure fail
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (const char* why = why_refused(grid, shape, shared_bytes)) {
    refuse(why);
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid, blockDim = shape;
  kernel = &body;
  block.thread_count = static_cast<int>(shape.x * shape.y * shape.z);
  block.warp_count = (block.thread_count + kLanes - 1) / kLanes;
  for (int i = 0; i < block.thread_count; ++i) {
    const unsigned rank = static_cast<unsigned>(i);
    block.threads[i].rank = i;
    block.threads[i].index = {rank % shape.x, rank / shape.x % shape.y, rank / shape.x / shape.y};
  }
  if (block.now > 1u << 30) {
    forget_shared();
    block.now = 1;
  }
  begin_shared(static_cast<uint32_t>(shared_bytes));
  guarded_run(run_grid, note_failure);
  return failed() ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace prunekernels::simt
