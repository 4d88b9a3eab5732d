// Launching, and the block's shared memory, for the device and for the emulator alike. Kernels are written in plain
// CUDA C++ with three exceptions, so that the same file also compiles as host C++ and runs under the emulator, which
// sees every access:
//   launch(...)    instead of <<<>>>
//   Shared<T>      instead of __shared__ arrays: all shared memory is dynamic, and is read and written by get() and
//                  set()
//   ptx.cuh        instead of inline assembly
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/scalar_types.h"
#include "cuda/kernels/stream.h"

#if !defined(PK_EMULATED)
#include <cuda_runtime.h>
#endif

#define PK_DEVICE __device__ __forceinline__
#define PK_HOST_DEVICE __host__ __device__ __forceinline__

namespace prunekernels {

constexpr int kWarp = 32;

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes;
};

#if defined(PK_EMULATED)

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t, Args... args) {
  return simt::run(shape.grid, shape.block, shape.shared_bytes, [&] { kernel(static_cast<Params>(args)...); });
}

#else

constexpr size_t kSharedWithoutAsking = 48 << 10;

// Lets a kernel have all the shared memory of a block that the device has. Less would do for one launch, but another
// thread may launch the same kernel between this call and that launch, and ask for more.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status != cudaSuccess) cudaGetLastError();  // else the next caller of it takes this error for its own
  return status;
}

// An empty grid launches nothing. Returns the error of the launch itself, not one that the kernel runs into later.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream, Args... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return cudaSuccess;
  if (shape.shared_bytes > kSharedWithoutAsking) {
    const cudaError_t status = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    if (status != cudaSuccess) return status;
  }
  // clang-format off
  kernel<<<shape.grid, shape.block, shape.shared_bytes, stream>>>(static_cast<Params>(args)...);
  // clang-format on
  return cudaGetLastError();
}

#endif

// visit(T{}) for the type T of an element.
template <typename Visit>
cudaError_t with_element(Element element, Visit visit) {
  switch (element) {
    case Element::f32:
      return visit(float{});
    case Element::bf16:
      return visit(BFloat16{});
    case Element::f16:
      return visit(Half{});
  }
  return cudaErrorInvalidValue;
}

// An address as the instructions of ptx.cuh take it: bytes into the shared window.
using SharedAddress = uint32_t;

// A stretch of the block's shared memory, by its offset in 32 bits. Vectors are as aligned as their size.
template <typename T>
class Shared {
 public:
  PK_DEVICE explicit Shared(size_t byte_offset) : offset_(static_cast<uint32_t>(byte_offset)) {}
  PK_DEVICE T get(int i) const { return get_vector<T>(i); }
  PK_DEVICE void set(int i, T value) const { set_vector(i, value); }
  PK_DEVICE Shared operator+(int elements) const { return Shared(offset(elements)); }
#if defined(PK_EMULATED)
  template <typename V>
  V get_vector(int i) const {  // elements i, i + 1, ... as one V
    return simt::shared_load<V>(offset(i));
  }
  template <typename V>
  void set_vector(int i, V value) const {
    simt::shared_store<V>(offset(i), value);
  }
  SharedAddress address(int i) const { return offset(i); }
#else
  template <typename V>
  PK_DEVICE V get_vector(int i) const {
    return *reinterpret_cast<const V*>(window() + offset(i));
  }
  template <typename V>
  PK_DEVICE void set_vector(int i, V value) const {
    *reinterpret_cast<V*>(window() + offset(i)) = value;
  }
  PK_DEVICE SharedAddress address(int i) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(window())) + offset(i);
  }
#endif

 private:
  PK_DEVICE uint32_t offset(int i) const { return offset_ + static_cast<uint32_t>(i) * sizeof(T); }
#if !defined(PK_EMULATED)
  PK_DEVICE static char* window() {
    extern __shared__ __align__(1024) char prunekernels_shared[];
    return prunekernels_shared;
  }
#endif
  uint32_t offset_;
};

}  // namespace prunekernels
