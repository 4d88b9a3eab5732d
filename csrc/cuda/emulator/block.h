// What the emulator's own files know of the block that runs: its threads, and what happened before what.
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

// Time of a block, counted in synchronisations: it stands still between two of them. Never 0, never goes back from one
// block to the next, so that what is noted of an earlier block is recognised by its age.
using Time = uint32_t;

struct Copy {  // of cp.async, under way
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
  Vote vote;  // at a barrier: its kind, and first what the thread says, then the outcome
  int voted;
  Collective collective;  // at a collective: which, with whom, and what it brings
  uint32_t mask;
  void* structure;
  Time knows[kLanes];  // what that lane of the warp did until then happened before what this thread does now
  std::vector<Copy> copies;
  int groups;  // of copies, committed

  int lane() const { return rank % kLanes; }
  int warp() const { return rank / kLanes; }
};

struct Warp {
  uint32_t exist;    // lanes
  uint32_t ready;    // lanes to go on
  uint32_t meeting;  // lanes at a collective
};

struct Block {
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / kLanes];
  int thread_count, warp_count;
  int at_barrier, returned;
  Time now = 1, begun, barrier;  // the block's begin, its last barrier
  Thread* self = nullptr;        // the one that runs
  Fiber scheduler;

  Thread* lanes_of(const Thread& thread) { return threads + thread.warp() * kLanes; }
  // Whether what thread rank did then happened before what self does now.
  bool ordered(int rank, Time then) const {
    return rank == self->rank || then <= barrier ||
           (rank / kLanes == self->warp() && then <= self->knows[rank % kLanes]);
  }
};
extern Block block;

// Leaves the thread that runs: for another of its warp if one is ready, else for the scheduler.
void leave();

void begin_shared(uint32_t bytes);
void forget_shared();  // for a clock that starts again

// Makes what self does the launch's failure, its place in the source included where fail() has a place.
void note_failure(const char* what);
bool failed();
void refuse(const char* why);  // the whole launch

}  // namespace prunekernels::simt
