// Where threads wait for each other: the barrier of a block, and the collectives of a warp.
#include "cuda/emulator/block.h"

namespace prunekernels::simt {
namespace {

// From now on, whatever any lane of the mask did or knew happened before what any of them does next.
void share_knowledge(Thread* lanes, uint32_t mask) {
  const Time now = block.now++;
  Time known[kLanes] = {};
  for (uint32_t left = mask; left; left &= left - 1) {
    const Thread& thread = lanes[__builtin_ctz(left)];
    for (int i = 0; i < kLanes; ++i) known[i] = max(known[i], thread.knows[i]);
  }
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) known[i] = now;
  for (uint32_t left = mask; left; left &= left - 1)
    std::memcpy(lanes[__builtin_ctz(left)].knows, known, sizeof(known));
}

// Whether every lane of self's mask has reached self's collective. A lane that waits at another one need not be an
// error: it may be on its way here, waiting for lanes outside of the mask.
bool all_there(const Thread* lanes, uint32_t meeting, const Thread& self, void** structures) {
  if ((meeting & self.mask) != self.mask) return false;
  for (uint32_t left = self.mask; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    if (lanes[i].mask != self.mask || !(lanes[i].collective == self.collective)) return false;
    structures[i] = lanes[i].structure;
  }
  return true;
}

void resolve_nothing(void* const*, uint32_t) {}

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

}  // namespace

int lane() { return block.self->lane(); }

int block_barrier(Vote vote, bool mine) {
  Thread& self = *block.self;
  self.at = Thread::At::barrier;
  self.vote = vote;
  self.voted = mine;
  if (++block.at_barrier < block.thread_count) {
    leave();
    return self.voted;
  }
  int yes = 0;
  for (int i = 0; i < block.thread_count; ++i) {
    if (block.threads[i].vote != vote) fail("barriers of different kinds: thread %d of the block is at another", i);
    yes += block.threads[i].voted;
  }
  const int outcome = vote == Vote::any ? yes > 0 : vote == Vote::all ? yes == block.thread_count : yes;
  for (int i = 0; i < block.thread_count; ++i) {
    block.threads[i].at = Thread::At::running;
    block.threads[i].voted = outcome;
  }
  for (int w = 0; w < block.warp_count; ++w) block.warps[w].ready = block.warps[w].exist;
  block.warps[self.warp()].ready &= ~(1u << self.lane());
  block.at_barrier = 0;
  block.barrier = block.now++;
  return outcome;
}

void meet(const Collective& collective, uint32_t mask, void* mine) {
  Thread& self = *block.self;
  Warp& warp = block.warps[self.warp()];
  Thread* lanes = block.lanes_of(self);
  const uint32_t bit = 1u << self.lane();
  if (!(mask & bit)) fail("%s: lane %d is not in its own mask 0x%08x", collective.name, self.lane(), mask);
  if (collective.whole_warp && warp.exist != kAllLanes) fail("%s needs all 32 lanes of the warp", collective.name);
  self.at = Thread::At::collective;
  self.collective = collective;
  self.mask = mask &= warp.exist;
  self.structure = mine;
  warp.meeting |= bit;
  void* structures[kLanes] = {};
  if (!all_there(lanes, warp.meeting, self, structures)) return leave();
  collective.resolve(structures, mask);
  if (collective.orders_memory) share_knowledge(lanes, mask);
  for (uint32_t left = mask; left; left &= left - 1) lanes[__builtin_ctz(left)].at = Thread::At::running;
  warp.meeting &= ~mask;
  warp.ready |= mask & ~bit;
}

unsigned ballot(const char* name, uint32_t mask, bool mine) {
  Ballot ballot{mine, 0};
  meet({name, Ballot::resolve}, mask, &ballot);
  return ballot.all;
}

}  // namespace prunekernels::simt

void __syncwarp(unsigned mask) {
  using namespace prunekernels::simt;
  meet({"__syncwarp", resolve_nothing, false, true}, mask, nullptr);
}
