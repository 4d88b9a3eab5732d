#include "cuda/emulator/simt.h"

#include <cstdarg>
#include <cstdio>
#include <string>

#include "cuda/emulator/block.h"
#include "cuda/emulator/segfault.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace prunekernels::simt {

Block block;

namespace {

struct Warp {
  uint32_t exist;    // lanes
  uint32_t ready;    // lanes to go on
  uint32_t meeting;  // lanes at a collective
  void* structures[kLanes];
};

Thread threads[kMaxThreads];
Warp warps[kMaxThreads / kLanes];
int thread_count, warp_count, at_barrier, exited;
const std::function<void()>* kernel;
Fiber scheduler;
std::string text;
bool failed;

void go_on(Thread& thread) {
  block.self = &thread;
  threadIdx = thread.index;
}

// Leaves the thread that runs: to another of its warp if one is ready, else to the scheduler.
void leave() {
  Thread& self = *block.self;
  Warp& warp = warps[self.warp()];
  if (!warp.ready) return switch_to(self.fiber, scheduler);
  Thread& next = threads[self.warp() * kLanes + __builtin_ctz(warp.ready)];
  warp.ready &= warp.ready - 1;
  go_on(next);
  switch_to(self.fiber, next.fiber);
}

void run_thread() {
  entered();
  (*kernel)();
  block.self->at = Thread::At::exit;
  ++exited;
  leave();
}

const char* whereabouts(const Thread& thread) {
  switch (thread.at) {
    case Thread::At::exit:
      return "has returned";
    case Thread::At::barrier:
      return "waits at a barrier of the block";
    case Thread::At::collective:
      return thread.collective.name;
    default:
      return "runs";
  }
}

void note_failure(const char* what) {
  char where[160];
  std::snprintf(where, sizeof(where), "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z,
                block.self->index.x, block.self->index.y, block.self->index.z);
  text = std::string(where) + what;
  failed = true;
}

// Says what holds up the block: nobody is ready, and not everybody has returned.
void report_stuck() {
  char what[256];
  for (int i = 0; i < thread_count; ++i) {
    const Thread& thread = threads[i];
    if (thread.at != Thread::At::collective) continue;
    const uint32_t missing = thread.mask & ~warps[thread.warp()].meeting;
    if (!missing) continue;
    const int lane = __builtin_ctz(missing);
    std::snprintf(what, sizeof(what), "%s entered by only part of its mask 0x%08x: lane %d %s", thread.collective.name,
                  thread.mask, lane, whereabouts(threads[thread.warp() * kLanes + lane]));
    block.self = &threads[i];
    return note_failure(what);
  }
  for (int i = 0; i < thread_count; ++i)
    if (threads[i].at == Thread::At::barrier) block.self = &threads[i];
  std::snprintf(what, sizeof(what), "barrier not reached by all threads: %d of %d wait there, %d have returned",
                at_barrier, thread_count, exited);
  note_failure(what);
}

void begin_block() {
  block.begun = block.barrier = block.now++;
  at_barrier = exited = 0;
  for (int w = 0; w < warp_count; ++w) {
    const int lanes = thread_count - w * kLanes;
    warps[w].exist = warps[w].ready = lanes >= kLanes ? 0xffffffff : (1u << lanes) - 1;
    warps[w].meeting = 0;
  }
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    thread.at = Thread::At::running;
    thread.copies.clear();
    thread.groups = 0;
    std::memset(thread.knows, 0, sizeof(thread.knows));
    prepare(thread.fiber, i, run_thread);
  }
}

void run_block() {
  begin_block();
  for (bool ran = true; ran;) {
    ran = false;
    for (int w = 0; w < warp_count; ++w) {
      if (!warps[w].ready) continue;
      ran = true;
      Thread& next = threads[w * kLanes + __builtin_ctz(warps[w].ready)];
      warps[w].ready &= warps[w].ready - 1;
      go_on(next);
      switch_to(scheduler, next.fiber);
      if (failed) return;
    }
  }
  if (exited != thread_count) report_stuck();
}

void run_grid() {
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        run_block();
        if (failed) return;
      }
}

cudaError_t refuse(const char* why) {
  text = why;
  return cudaErrorInvalidConfiguration;
}

}  // namespace

const char* report() { return text.c_str(); }

void fail(const char* format, ...) {
  char what[512];
  va_list words;
  va_start(words, format);
  std::vsnprintf(what, sizeof(what), format, words);
  va_end(words);
  note_failure(what);
  for (;;) switch_to(block.self->fiber, scheduler);
}

cudaError_t run(dim3 grid, dim3 block_shape, size_t shared_bytes, const std::function<void()>& body) {
  text.clear();
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return refuse("grid larger than 2^31 - 1, 65535, 65535");
  const uint64_t count = static_cast<uint64_t>(block_shape.x) * block_shape.y * block_shape.z;
  if (count == 0 || count > kMaxThreads || block_shape.z > 64)
    return refuse("block of no or more than 1024 threads, or z > 64");
  if (shared_bytes > kMaxSharedBytes) return refuse("more than 227 KB of shared memory");

  gridDim = grid, blockDim = block_shape;
  kernel = &body;
  failed = false;
  thread_count = static_cast<int>(count);
  warp_count = (thread_count + kLanes - 1) / kLanes;
  for (int i = 0; i < thread_count; ++i) {
    const unsigned rank = static_cast<unsigned>(i);
    threads[i].rank = i;
    threads[i].index = {rank % blockDim.x, rank / blockDim.x % blockDim.y, rank / blockDim.x / blockDim.y};
  }
  if (block.now > 1u << 30) {
    forget_shared();
    block.now = 1;
  }
  begin_shared(static_cast<uint32_t>(shared_bytes));
  guarded_run(run_grid, note_failure);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

int lane() { return block.self->lane(); }

int block_barrier(Vote vote, bool mine) {
  Thread& self = *block.self;
  self.at = Thread::At::barrier;
  self.vote = vote;
  self.voted = mine;
  if (++at_barrier < thread_count) {
    leave();
    return self.voted;
  }
  int yes = 0;
  for (int i = 0; i < thread_count; ++i) {
    if (threads[i].vote != vote) fail("barriers of different kinds: thread %d of the block is at another", i);
    yes += threads[i].voted;
  }
  const int outcome = vote == Vote::any ? yes > 0 : vote == Vote::all ? yes == thread_count : yes;
  for (int i = 0; i < thread_count; ++i) {
    threads[i].at = Thread::At::running;
    threads[i].voted = outcome;
  }
  for (int w = 0; w < warp_count; ++w) warps[w].ready = warps[w].exist;
  warps[self.warp()].ready &= ~(1u << self.lane());
  at_barrier = 0;
  block.barrier = block.now++;
  return outcome;
}

namespace {

// Each of the mask's lanes now knows what any of them did or knew.
void share_knowledge(Thread* lanes, uint32_t mask) {
  const Time now = block.now++;
  Time known[kLanes] = {};
  for (uint32_t left = mask; left; left &= left - 1) {
    const Thread& thread = lanes[__builtin_ctz(left)];
    for (int i = 0; i < kLanes; ++i) known[i] = thread.knows[i] > known[i] ? thread.knows[i] : known[i];
  }
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) known[i] = now;
  for (uint32_t left = mask; left; left &= left - 1)
    std::memcpy(lanes[__builtin_ctz(left)].knows, known, sizeof(known));
}

}  // namespace

void meet(const Collective& collective, uint32_t mask, void* mine) {
  Thread& self = *block.self;
  Warp& warp = warps[self.warp()];
  Thread* lanes = &threads[self.warp() * kLanes];
  const uint32_t bit = 1u << self.lane();
  if (!(mask & bit)) fail("%s: lane %d is not in its own mask 0x%08x", collective.name, self.lane(), mask);
  if (collective.whole_warp && warp.exist != 0xffffffff) fail("%s needs all 32 lanes of the warp", collective.name);
  mask &= warp.exist;
  self.at = Thread::At::collective;
  self.collective = collective;
  self.mask = mask;
  warp.structures[self.lane()] = mine;
  warp.meeting |= bit;
  if ((warp.meeting & mask) != mask) return leave();

  void* structures[kLanes] = {};
  for (uint32_t left = mask; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    const Thread& other = lanes[i];
    if (other.collective.resolve != collective.resolve || other.mask != mask)
      fail("%s of mask 0x%08x entered by only part of its mask: lane %d is at %s of mask 0x%08x", collective.name, mask,
           i, other.collective.name, other.mask);
    structures[i] = warp.structures[i];
  }
  collective.resolve(structures, mask);
  share_knowledge(lanes, mask);
  for (uint32_t left = mask; left; left &= left - 1) lanes[__builtin_ctz(left)].at = Thread::At::running;
  warp.meeting &= ~mask;
  warp.ready |= mask & ~bit;
}

namespace {

struct Ballot {
  bool mine;
  unsigned all;
  static void resolve(void* const* lanes, uint32_t mask) {
    unsigned all = 0;
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1) all |= static_cast<unsigned>(static_cast<Ballot*>(lanes[i])->mine) << i;
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1) static_cast<Ballot*>(lanes[i])->all = all;
  }
};

void resolve_nothing(void* const*, uint32_t) {}

}  // namespace

unsigned ballot(const char* name, uint32_t mask, bool mine) {
  Ballot ballot{mine, 0};
  meet({name, Ballot::resolve, false}, mask, &ballot);
  return ballot.all;
}

}  // namespace prunekernels::simt

void __syncwarp(unsigned mask) {
  prunekernels::simt::meet({"__syncwarp", prunekernels::simt::resolve_nothing, false}, mask, nullptr);
}
