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
  Vote vote;  // at a barrier: its kind, and what came out
  int voted;
  Collective collective;  // at a collective: which
  uint32_t mask;
  Time knows[kLanes];  // what that lane of the warp did until then happened before what this thread does now
  std::vector<Copy> copies;
  int groups;  // committed

  int lane() const { return rank % kLanes; }
  int warp() const { return rank / kLanes; }
};

struct Block {
  Time now = 1, begun = 0, barrier = 0;  // the block's begin, its last barrier
  Thread* self = nullptr;

  bool ordered(int rank, Time time) const {  // whether what thread rank did then happened before what self does now
    return rank == self->rank || time <= barrier ||
           (rank / kLanes == self->warp() && time <= self->knows[rank % kLanes]);
  }
};
extern Block block;

void begin_shared(uint32_t bytes);
void forget_shared();  // for a clock that starts again

}  // namespace prunekernels::simt
