// A SIMT machine in ordinary C++: kernels compiled for the host run on it, and what real hardware would leave undefined
// is reported. Blocks run one after another, each thread of a block on a fiber that goes on until a barrier of the
// block or a collective of its warp. Stricter than hardware in one respect: threads that have returned do not count as
// having reached a barrier or a collective.
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

// Runs the kernel on every thread of every block. cudaErrorLaunchFailure where there is something to report: the launch
// stops there, and launches fail until the report is taken.
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
const char* take_report();  // "" where nothing failed

// Ends the launch. Of the text: which block and thread does what; printf's words.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Where the lanes of a warp meet: each brings a structure of its own, the last to arrive resolves all of them.
struct Collective {
  const char* name;
  void (*resolve)(void* const* lanes, uint32_t mask);  // [32] structures, null for lanes outside of mask
  bool whole_warp = false;                             // needs 32 threads, as .aligned instructions do
  bool orders_memory = false;  // as __syncwarp does, and neither shuffles and votes nor ldmatrix and mma do
  bool operator==(const Collective& other) const { return name == other.name && resolve == other.resolve; }
};
void meet(const Collective& collective, uint32_t mask, void* mine);
int lane();

enum class Vote { none, any, all, count };
int block_barrier(Vote vote, bool mine);

// What a lane that takes no part would have given: garbage, so that its use shows.
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

// ---- the words of CUDA C++ that concern other threads ----

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

// On global memory. Threads change places only at barriers and collectives, so that plain code is atomic here.
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
