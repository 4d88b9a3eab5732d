// Everything that the CUDA operators ask of the device. device.cpp answers for CUDA; device_emulated.cpp (PK_EMULATED)
// answers for kernels that run on the host over CPU tensors, so that the operators are tested where there is no GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/util/FunctionRef.h>

#include <memory>
#include <mutex>
#include <vector>

#include "cuda/kernels/stream.h"

#if defined(PK_EMULATED)
#define PK_DEVICE_OPERATORS(m) TORCH_LIBRARY_IMPL(prunekernels_emulated, CPU, m)
#else
#define PK_DEVICE_OPERATORS(m) TORCH_LIBRARY_IMPL(prunekernels, CUDA, m)
#endif

// Calls a launcher; "operator: launcher: what CUDA says" where it fails.
#define PK_LAUNCH(op, launcher, ...) prunekernels::device::check_launch(launcher(__VA_ARGS__), op, #launcher)

namespace prunekernels::device {

void check_launch(cudaError_t status, const char* op, const char* launcher);

// Of the current device, which the operators set to that of their tensors.
cudaStream_t current_stream();
int multiprocessors();
bool runs_kernels();              // whether this build has kernels that the device can run
bool multiplies_by_warpgroups();  // wgmma: compute capability 9.0, and kernels for sm_90a
bool capturing();                 // the current stream, into a graph

// Whether torch lets convolutions of floats run on tensor cores.
bool allows_tf32();
// cudnn.benchmark: the vendor's convolutions are then tuned for each size.
bool tunes_vendor();

// Time of one run of work on the current stream, without what the host takes to enqueue it. Waits for the device. A
// graph that another thread captures is not disturbed, whatever work does.
double milliseconds(c10::function_ref<void()> work);

// Copies that wait until the data is there, for every stream.
at::Tensor upload(const std::vector<int32_t>& words, at::Device device);
std::vector<int32_t> download(const at::Tensor& words);  // int32 [n]

// Device memory that outlives the call that made it, and may be read by kernels of any stream, and by graphs.
class DeviceBuffers : public std::enable_shared_from_this<DeviceBuffers> {
 public:
  virtual ~DeviceBuffers() = default;
  DeviceBuffers() = default;
  DeviceBuffers(const DeviceBuffers&) = delete;

  // Before every use: the memory goes back to torch only when the kernels of this stream are done with it; while a
  // graph is captured, only when that graph is destroyed.
  void used_here() const;

 protected:
  at::Tensor keep(const at::Tensor& memory) const;
  const int32_t* keep(const std::vector<int32_t>& words, at::Device device) const;  // on the device, 16-byte aligned

 private:
  mutable std::mutex mutex_;
  mutable std::vector<at::Tensor> memory_;
  mutable std::vector<c10::Stream> streams_;  // that all of memory_ is known to be used on
};

// Frees the buffers of graphs destroyed since the last call. Not to be called while a graph is captured.
void release_forgotten();

}  // namespace prunekernels::device
