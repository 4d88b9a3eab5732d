// What tests force: tiles and slices that the sizes of a test would not get on a large GPU. Not for users: nothing in
// this package calls pk_force_tiles().
#pragma once

#include "cuda/kernels/igemm.h"

#if defined(_WIN32)
#define PK_FOR_TESTS extern "C" __declspec(dllexport)
#else
#define PK_FOR_TESTS extern "C" __attribute__((visibility("default")))
#endif

namespace prunekernels::forced_tiles {

int multiprocessors();  // those of the device, unless forced
IgemmTile tile(IgemmTile chosen);
GradWeightPlan plan(GradWeightPlan chosen);

}  // namespace prunekernels::forced_tiles

// Numbers of IgemmTile and GradWeightTile, of slices and of multiprocessors; -1: as chosen. A tile that a kernel does
// not have raises.
PK_FOR_TESTS void pk_force_tiles(int tile, int grad_tile, int64_t splits, int multiprocessors);
// tile, grad_tile, splits and multiprocessors of the last calls.
PK_FOR_TESTS void pk_last_tiles(int64_t* four);
