// Counts what launches would move on a device: sectors of global memory, wavefronts of shared memory, products of
// tensor cores. Off unless pk_traffic_begin() was called. Accesses to global memory are seen in kernels that are
// compiled with -fsanitize=thread, whose hooks are in traffic.cpp, so kernels need no change.
#pragma once

#include <cstdint>

namespace prunekernels::simt::traffic {

extern bool on;

// One access of the running thread. site: where in the code, the same for the lanes of a warp that access together.
// cached: it looks into the L1 cache.
void global(const void* at, uint32_t bytes, bool writes, const void* site, bool cached = true);
void shared(uint32_t at, uint32_t bytes, const void* site);
void product();                         // of one warp
void read_by_products(uint32_t bytes);  // of shared memory, free of conflicts
void end_of_block();

}  // namespace prunekernels::simt::traffic
