// wgmma for the emulator: products of matrices in shared memory, which a warp starts and waits for later. Each warp of
// a warpgroup computes its 16 of the 64 rows when it waits, so that whatever changed in between shows:
//   sums that are read too early are NaN
//   operands that were overwritten in between are reported
// Also reported: operands that no fence.proxy.async of their writers has made visible, sums without wgmma.fence,
// products that are never waited for, and descriptors that are not those of K-major tiles with 128-byte swizzle.
#pragma once

#include <cstdint>

namespace prunekernels::simt {

using Widen = float (*)(uint16_t);

// d: 64 floats of this lane; a, b: descriptors of [64][16] and [128][16] elements of 2 bytes.
void start_product(const char* name, float* d, uint64_t a, uint64_t b, Widen widen);
void fence_products();
void commit_products();
void wait_for_products(int pending);
// Of this thread: what it wrote to shared memory before, products may read.
void fence_async_proxy();

void begin_products();     // of a block
bool are_products_left();  // that no warp has waited for

}  // namespace prunekernels::simt
