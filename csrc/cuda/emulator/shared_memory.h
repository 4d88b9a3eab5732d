// The shared memory of the running block, with a record of the reads and writes of each byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace prunekernels::simt {

void load_shared(uint32_t address, void* to, uint32_t bytes, uint32_t alignment);
void store_shared(uint32_t address, const void* from, uint32_t bytes, uint32_t alignment);

template <typename T>
T shared_load(uint32_t address) {
  T value;
  load_shared(address, &value, sizeof(T), alignof(T));
  return value;
}
template <typename T>
void shared_store(uint32_t address, T value) {
  store_shared(address, &value, sizeof(T), alignof(T));
}

// As the products of async_products.h read: what its writers have not fenced since is reported.
void read_by_product(uint32_t address, void* to, uint32_t bytes);

// Of the thread that runs: a copy that arrives when it waits for it, groups of copies, waiting for all groups but the
// youngest pending.
void copy_async(uint32_t to, const void* from, uint32_t bytes, bool valid, bool cached);
void commit_copies();
void wait_for_copies(int pending);

}  // namespace prunekernels::simt
