#include "cuda/forced_tiles.h"

#include <array>
#include <atomic>

#include "cuda/device.h"

namespace {

enum { kTile, kGradTile, kSplits, kMultiprocessors };

std::array<std::atomic<int64_t>, 4> forced{-1, -1, -1, -1}, last{-1, -1, -1, -1};

template <typename T>
T decided(int what, T chosen) {
  const int64_t number = forced[what];
  return static_cast<T>(last[what] = number < 0 ? static_cast<int64_t>(chosen) : number);
}

}  // namespace

namespace prunekernels::forced_tiles {

int multiprocessors() { return decided(kMultiprocessors, device::multiprocessors()); }

IgemmTile tile(IgemmTile chosen) { return decided(kTile, chosen); }

GradWeightPlan plan(GradWeightPlan chosen) {
  const int64_t slice = chosen.partial_floats / chosen.splits, splits = decided(kSplits, chosen.splits);
  return {decided(kGradTile, chosen.tile), splits, splits * slice};
}

}  // namespace prunekernels::forced_tiles

void pk_force_tiles(int tile, int grad_tile, int64_t splits, int multiprocessors) {
  forced[kTile] = tile, forced[kGradTile] = grad_tile;
  forced[kSplits] = splits, forced[kMultiprocessors] = multiprocessors;
}

void pk_last_tiles(int64_t* four) {
  for (int i = 0; i < 4; ++i) four[i] = last[i];
}
