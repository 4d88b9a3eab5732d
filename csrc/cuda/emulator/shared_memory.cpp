#include "cuda/emulator/shared_memory.h"

#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/emulator/block.h"
#include "cuda/emulator/traffic.h"

namespace prunekernels::simt {
namespace {

// The record of one byte. Of its readers since the block's last barrier it holds the lanes of the warp that read last
// and one other warp; more are forgotten, so a race may be missed, but none is made up.
struct Cell {
  Time written, read, read_by_other;
  uint32_t lanes;
  uint32_t fences;  // of its writer, which it had passed before
  uint16_t writer;
  uint8_t warp, other_warp;
  bool in_flight;  // written by a cp.async of writer that has not been waited for
};

unsigned char arena[kMaxSharedBytes];
Cell cells[kMaxSharedBytes];
uint32_t arena_bytes;

struct Name {  // of a thread, in a report
  char text[48];
  explicit Name(int rank) {
    const int x = static_cast<int>(blockDim.x), y = static_cast<int>(blockDim.y);
    std::snprintf(text, sizeof(text), "thread (%d, %d, %d)", rank % x, rank / x % y, rank / x / y);
  }
};

[[noreturn]] void race(const char* does, const char* other_did, int other, uint32_t address) {
  fail("race: %s shared byte %u, which %s %s with no barrier (in a warp: __syncwarp) in between", does, address,
       Name(other).text, other_did);
}

void check_place(const char* does, uint32_t address, uint32_t bytes, uint32_t alignment) {
  if (address > arena_bytes || bytes > arena_bytes - address)
    fail("%s shared bytes [%u, %u) out of range: the block has %u", does, address, address + bytes, arena_bytes);
  if (address % alignment != 0)
    fail("%s %u shared bytes at %u: misaligned, must be a multiple of %u", does, bytes, address, alignment);
}

bool all_ordered(const Cell& cell) {
  for (uint32_t left = cell.lanes; left; left &= left - 1)
    if (!block.ordered(cell.warp * kLanes + __builtin_ctz(left), cell.read)) return false;
  return true;
}

void note_read(Cell& cell, uint32_t address) {
  if (cell.written <= block.begun) fail("reads shared byte %u, which was never written", address);
  if (cell.in_flight) fail("reads shared byte %u under an unfinished cp.async of %s", address, Name(cell.writer).text);
  if (!block.ordered(cell.writer, cell.written)) race("reads", "wrote", cell.writer, address);

  const auto warp = static_cast<uint8_t>(block.self->warp());
  const uint32_t lane = 1u << block.self->lane();
  if (cell.read <= block.barrier) {
    cell.warp = warp, cell.lanes = lane, cell.read = block.now;
  } else if (cell.warp != warp) {
    cell.other_warp = cell.warp, cell.read_by_other = cell.read;
    cell.warp = warp, cell.lanes = lane, cell.read = block.now;
  } else if (cell.read == block.now || !all_ordered(cell)) {
    cell.lanes |= lane;  // dated by the earliest
  } else {
    cell.lanes = lane, cell.read = block.now;
  }
}

void note_write(Cell& cell, uint32_t address, bool in_flight) {
  const char* does = in_flight ? "cp.async writes" : "writes";
  if (cell.written > block.begun) {
    if (cell.in_flight)
      fail("%s shared byte %u under an unfinished cp.async of %s", does, address, Name(cell.writer).text);
    if (!block.ordered(cell.writer, cell.written)) race(does, "wrote", cell.writer, address);
  }
  if (cell.read > block.barrier) {
    for (uint32_t left = cell.lanes; left; left &= left - 1) {
      const int reader = cell.warp * kLanes + __builtin_ctz(left);
      if (!block.ordered(reader, cell.read)) race(does, "read", reader, address);
    }
    if (cell.read_by_other > block.barrier && cell.other_warp != block.self->warp())
      race(does, "read", cell.other_warp * kLanes, address);
  }
  cell.written = block.now;
  cell.writer = static_cast<uint16_t>(block.self->rank);
  cell.fences = block.self->proxy_fences;
  cell.in_flight = in_flight;
  cell.read = cell.read_by_other = 0;
}

}  // namespace

void begin_shared(uint32_t bytes) { arena_bytes = bytes; }

void forget_shared() { std::memset(cells, 0, sizeof(cells)); }

void load_shared(uint32_t address, void* to, uint32_t bytes, uint32_t alignment) {
  check_place("reads", address, bytes, alignment);
  if (traffic::on) traffic::shared(address, bytes, __builtin_return_address(0));
  for (uint32_t i = 0; i < bytes; ++i) note_read(cells[address + i], address + i);
  std::memcpy(to, arena + address, bytes);
}

void read_by_product(uint32_t address, void* to, uint32_t bytes) {
  check_place("a product reads", address, bytes, bytes);
  for (uint32_t i = 0; i < bytes; ++i) {
    Cell& cell = cells[address + i];
    note_read(cell, address + i);
    if (cell.fences == block.threads[cell.writer].proxy_fences)
      fail("a product reads shared byte %u, which %s wrote without a fence.proxy.async since", address + i,
           Name(cell.writer).text);
  }
  std::memcpy(to, arena + address, bytes);
}

void store_shared(uint32_t address, const void* from, uint32_t bytes, uint32_t alignment) {
  check_place("writes", address, bytes, alignment);
  if (traffic::on) traffic::shared(address, bytes, __builtin_return_address(0));
  for (uint32_t i = 0; i < bytes; ++i) note_write(cells[address + i], address + i, false);
  std::memcpy(arena + address, from, bytes);
}

void copy_async(uint32_t to, const void* from, uint32_t bytes, bool valid, bool cached) {
  check_place("cp.async writes", to, bytes, bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0)  // whether anything is read or not
    fail("cp.async reads %u global bytes at %p: misaligned", bytes, from);
  if (traffic::on) {
    if (valid) traffic::global(from, bytes, false, __builtin_return_address(0), cached);
    traffic::shared(to, bytes, static_cast<const char*>(__builtin_return_address(0)) + 1);
  }
  Copy copy{to, bytes, block.self->groups, {}};
  if (valid) std::memcpy(copy.data.data(), from, bytes);
  for (uint32_t i = 0; i < bytes; ++i) note_write(cells[to + i], to + i, true);
  block.self->copies.push_back(copy);
}

void commit_copies() { ++block.self->groups; }

void wait_for_copies(int pending) {
  auto& copies = block.self->copies;
  const int arrived = block.self->groups - pending;  // groups of a number below this
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (copy.group >= arrived) {
      copies[kept++] = copy;
      continue;
    }
    std::memcpy(arena + copy.to, copy.data.data(), copy.bytes);
    for (uint32_t i = 0; i < copy.bytes; ++i) {
      cells[copy.to + i].in_flight = false;
      cells[copy.to + i].written = block.now;
      cells[copy.to + i].fences = block.self->proxy_fences;
    }
  }
  copies.resize(kept);
}

}  // namespace prunekernels::simt
