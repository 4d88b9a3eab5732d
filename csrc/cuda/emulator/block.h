// The state of the running block, shared by the emulator's own files: its threads, and what happened before what.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cuda/emulator/fiber.h"
#include "cuda/emulator/simt.h"

namespace prunekernels::simt {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr uint32_t kMaxSharedBytes = 227 << 10;
constexpr uint32_t kAllLanes = 0xffffffff;

// The time of a block: the number of its synchronisations so far. It is never 0 and is not reset from one block to the
// next, so that what was noted by an earlier block is recognised by its age.
using Time = uint32_t;

struct Copy {  // a cp.async that has not arrived
  uint32_t to, bytes;
  int group;
  std::array<unsigned char, 16> data;
};

struct Thread {
  enum class At { running, barrier, collective, exit };

  Fiber fiber;
  uint3 index;
  int rank;
  At at;
  Vote vote;              // at a barrier: its kind
  int voted;              // the thread's vote; after the barrier the outcome
  Collective collective;  // at a collective: which one, its mask, and the lane's operands
  uint32_t mask;
  void* structure;
  Time knows[kLanes];  // what lane i did up to knows[i] happened before what this thread does now
  std::vector<Copy> copies;
  int groups;             // committed groups of copies
  uint32_t proxy_fences;  // how many it has passed, see async_products.h

  int lane() const { return rank % kLanes; }
  int warp() const { return rank / kLanes; }
};

struct Warp {
  uint32_t exist;    // lanes
  uint32_t ready;    // lanes that can go on
  uint32_t meeting;  // lanes that wait at a collective
};

struct Block {
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / kLanes];
  int thread_count, warp_count;
  int at_barrier, returned;
  Time now = 1, begun, barrier;  // begun: when the block began; barrier: its last barrier
  Thread* self = nullptr;        // the running thread
  Fiber scheduler;

  Thread* lanes_of(const Thread& thread) { return threads + thread.warp() * kLanes; }
  // Whether what thread `rank` did at time `then` happened before what self does now.
  bool ordered(int rank, Time then) const {
    return rank == self->rank || then <= barrier ||
           (rank / kLanes == self->warp() && then <= self->knows[rank % kLanes]);
  }
};
extern Block block;

// Switches from the running thread to a ready one of its warp, or else to the scheduler.
void leave();

void begin_shared(uint32_t bytes);
void forget_shared();  // before the clock starts again

// Records `what` as the reason why the launch fails, with self's block and thread and the place in the kernel.
void note_failure(const char* what);
bool failed();
void refuse(const char* why);  // records why a launch cannot even start

}  // namespace prunekernels::simt
