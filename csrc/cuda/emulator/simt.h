// Runs kernels that are compiled for the host, and reports what is undefined on real hardware (races, missing barriers,
// accesses out of range). Blocks run one after another. Each thread of a block is a fiber, which runs until it reaches
// a barrier of the block or a collective of its warp. Stricter than hardware in one respect: threads that have returned
// do not count as having reached a barrier or a collective.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda/emulator/cuda_words.h"
#include "cuda/emulator/shared_memory.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace prunekernels::simt {

// Runs the kernel on every thread of every block. On a failure the launch stops and returns cudaErrorLaunchFailure, as
// do all later launches until the report is taken.
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
const char* take_report();  // "" if nothing failed

// Ends the launch with a report: the running block and thread, then the message, formatted as by printf.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// An operation of the lanes of a warp together: each brings a structure with its operands, and the last lane to arrive
// calls resolve, which writes the results into all of them.
struct Collective {
  const char* name;
  void (*resolve)(void* const* lanes, uint32_t mask);  // [32] structures, null for lanes outside of mask
  bool whole_warp = false;                             // needs 32 threads, as .aligned instructions do
  bool orders_memory = false;                          // __syncwarp does; shuffles, votes, ldmatrix and mma do not
  bool operator==(const Collective& other) const { return name == other.name && resolve == other.resolve; }
};
void meet(const Collective& collective, uint32_t mask, void* mine);
int lane();

enum class Vote { none, any, all, count };
int block_barrier(Vote vote, bool mine);

// What a shuffle from a lane outside of the mask gives: garbage, so that its use shows.
template <typename T>
T garbage() {
  T value;
  std::memset(&value, 0xff, sizeof(value));
  return value;
}

template <typename T>
struct Shuffle {
  T value;
  int source;  // lane
  static void resolve(void* const* lanes, uint32_t mask) {
    T values[32];
    for (int i = 0; i < 32; ++i) values[i] = mask >> i & 1 ? static_cast<Shuffle*>(lanes[i])->value : garbage<T>();
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) {
        auto& mine = *static_cast<Shuffle*>(lanes[i]);
        mine.value = values[mine.source];
      }
  }
};

template <typename T>
T shuffle(const char* name, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the device's shuffles take");
  Shuffle<T> mine{value, source};
  meet({name, Shuffle<T>::resolve}, mask, &mine);
  return mine.value;
}

unsigned ballot(const char* name, uint32_t mask, bool mine);

}  // namespace prunekernels::simt

// ---- the functions of CUDA C++ that concern several threads ----

inline void __syncthreads() { prunekernels::simt::block_barrier(prunekernels::simt::Vote::none, false); }
inline int __syncthreads_or(int mine) { return prunekernels::simt::block_barrier(prunekernels::simt::Vote::any, mine); }
inline int __syncthreads_and(int mine) {
  return prunekernels::simt::block_barrier(prunekernels::simt::Vote::all, mine);
}
inline int __syncthreads_count(int mine) {
  return prunekernels::simt::block_barrier(prunekernels::simt::Vote::count, mine);
}
void __syncwarp(unsigned mask = 0xffffffff);
inline void __threadfence() {}
inline void __threadfence_block() {}

// Within segments of width lanes, a power of two.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = prunekernels::simt::lane() & -width;
  return prunekernels::simt::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = prunekernels::simt::lane(), source = lane ^ bits;
  return prunekernels::simt::shuffle("__shfl_xor_sync", mask, value, source < (lane & -width) + width ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = prunekernels::simt::lane(), source = lane + static_cast<int>(distance);
  return prunekernels::simt::shuffle("__shfl_down_sync", mask, value, source < (lane & -width) + width ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = prunekernels::simt::lane(), source = lane - static_cast<int>(distance);
  return prunekernels::simt::shuffle("__shfl_up_sync", mask, value, source >= (lane & -width) ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int mine) {
  return prunekernels::simt::ballot("__ballot_sync", mask, mine);
}
inline int __any_sync(unsigned mask, int mine) { return prunekernels::simt::ballot("__any_sync", mask, mine) != 0; }
inline int __all_sync(unsigned mask, int mine) { return prunekernels::simt::ballot("__all_sync", mask, !mine) == 0; }

// Atomics on global memory. Fibers switch only at barriers and collectives, so plain code is atomic here.
template <typename T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <typename T>
T atomicSub(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = old - value;
  return old;
}
template <typename T>
T atomicMax(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = max(old, value);
  return old;
}
template <typename T>
T atomicMin(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = min(old, value);
  return old;
}
template <typename T>
T atomicOr(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = old | value;
  return old;
}
template <typename T>
T atomicAnd(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = old & value;
  return old;
}
template <typename T>
T atomicExch(T* at, std::common_type_t<T> value) {
  const T old = *at;
  *at = value;
  return old;
}
template <typename T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
  const T old = *at;
  if (old == expected) *at = value;
  return old;
}
