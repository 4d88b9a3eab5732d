#include "cuda/device.h"

#if !defined(PK_EMULATED)

#include <ATen/Context.h>
#include <ATen/cuda/Sleep.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/gpu_architectures.h"

// setup.py names what nvcc compiles: sm_80,compute_80,sm_90a
#if !defined(PRUNEKERNELS_CUDA_ARCHITECTURES)
#define PRUNEKERNELS_CUDA_ARCHITECTURES ""
#endif

namespace prunekernels::device {
namespace {

// Spinning gives the host this much of a start (some 200 us), so that the kernels of a run follow one another as they
// do in a training step, where the host is ahead.
constexpr int64_t kHeadStartCycles = 400'000;

// The parameter's type depends on the version of torch: the operator's name, or an enumerator.
template <typename Op>
bool allows_tf32_for_conv(bool (at::Context::*allows)(Op) const) {
  using Name = std::decay_t<Op>;
  if constexpr (std::is_same_v<Name, std::string>)
    return (at::globalContext().*allows)("conv");
  else
    return (at::globalContext().*allows)(Name::value_type::CONV);
}

// Waiting for the device and allocating would break off the capture of a graph by another thread, unless this thread
// says that it knows what it does.
using DisturbsNoCapture = c10::cuda::CUDAStreamCaptureModeGuard;

struct Event {
  cudaEvent_t event = nullptr;
  Event() { C10_CUDA_CHECK(cudaEventCreate(&event)); }
  ~Event() { C10_CUDA_CHECK_WARN(cudaEventDestroy(event)); }
  Event(const Event&) = delete;
};

cudaGraph_t graph_being_captured() {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(current_stream(), &status, nullptr, &graph));
#else
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(current_stream(), &status, nullptr, &graph));
#endif
  return status == cudaStreamCaptureStatusActive ? graph : nullptr;
}

// What destroyed graphs held. They say so on a thread of the driver's that must not call CUDA, so freeing has to wait.
struct Forgotten {
  std::mutex mutex;
  std::vector<std::shared_ptr<const DeviceBuffers>> items;
};

Forgotten& forgotten() {
  static Forgotten* const forgotten = new Forgotten;  // never destroyed: graphs may outlive static destructors
  return *forgotten;
}

using Hold = std::shared_ptr<const DeviceBuffers>;

void CUDART_CB forget(void* hold) {
  const std::unique_ptr<Hold> mine(static_cast<Hold*>(hold));
  const std::lock_guard lock(forgotten().mutex);
  forgotten().items.push_back(std::move(*mine));
}

// The graph, and every executable made of it, holds a reference until it is destroyed and its launches are done.
void hold_in(cudaGraph_t graph, Hold kept) {
  auto hold = std::make_unique<Hold>(std::move(kept));
  cudaUserObject_t object;
  C10_CUDA_CHECK(cudaUserObjectCreate(&object, hold.get(), forget, 1, cudaUserObjectNoDestructorSync));
  hold.release();
  const cudaError_t status = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (status != cudaSuccess) C10_CUDA_CHECK_WARN(cudaUserObjectRelease(object, 1));
  C10_CUDA_CHECK(status);
}

}  // namespace

void check_launch(cudaError_t status, const char* op, const char* launcher) {
  TORCH_CHECK(status == cudaSuccess, op, ": ", launcher, ": ", cudaGetErrorString(status),
              status == cudaErrorNoKernelImageForDevice ? "; this build has " PRUNEKERNELS_CUDA_ARCHITECTURES : "");
}

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

namespace {

enum : int8_t { kUnknown = 0, kRuns = 1, kWarpgroups = 2, kKnown = 4 };

// What the current device can do with this build's kernels.
int8_t abilities() {
  static std::array<std::atomic<int8_t>, 64> known{};
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  std::atomic<int8_t>& answer = known[static_cast<size_t>(device) % known.size()];
  if (answer == kUnknown) {
    constexpr std::string_view kBuilt = PRUNEKERNELS_CUDA_ARCHITECTURES;
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    const bool warpgroups = major == 9 && minor == 0 && kBuilt.find("sm_90a") != std::string_view::npos;
    answer = static_cast<int8_t>(kKnown | (runs_on(kBuilt, major, minor) ? kRuns : 0) | (warpgroups ? kWarpgroups : 0));
  }
  return answer;
}

}  // namespace

bool runs_kernels() { return abilities() & kRuns; }

bool multiplies_by_warpgroups() { return abilities() & kWarpgroups; }

bool capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

bool allows_tf32() { return allows_tf32_for_conv(&at::Context::allowTF32CuDNN); }

bool tunes_vendor() { return at::globalContext().benchmarkCuDNN(); }

double milliseconds(c10::function_ref<void()> work) {
  const DisturbsNoCapture guard(cudaStreamCaptureModeRelaxed);
  const Event start, end;
  at::cuda::sleep(kHeadStartCycles);
  C10_CUDA_CHECK(cudaEventRecord(start.event, current_stream()));
  work();
  C10_CUDA_CHECK(cudaEventRecord(end.event, current_stream()));
  C10_CUDA_CHECK(cudaEventSynchronize(end.event));
  float ms = 0;
  C10_CUDA_CHECK(cudaEventElapsedTime(&ms, start.event, end.event));
  return ms;
}

at::Tensor upload(const std::vector<int32_t>& words, at::Device device) {
  const DisturbsNoCapture guard(cudaStreamCaptureModeRelaxed);
  const auto host = at::from_blob(const_cast<int32_t*>(words.data()), {static_cast<int64_t>(words.size())}, at::kInt);
  const at::Tensor there = host.to(device);
  C10_CUDA_CHECK(cudaStreamSynchronize(current_stream()));  // other streams do not wait for this one
  return there;
}

std::vector<int32_t> download(const at::Tensor& words) {
  const DisturbsNoCapture guard(cudaStreamCaptureModeRelaxed);
  const at::Tensor here = words.to(at::kCPU).contiguous();
  return {here.const_data_ptr<int32_t>(), here.const_data_ptr<int32_t>() + here.numel()};
}

void DeviceBuffers::used_here() const {
  const c10::Stream stream = c10::cuda::getCurrentCUDAStream();
  {
    const std::lock_guard lock(mutex_);
    if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) {
      streams_.push_back(stream);
      for (const at::Tensor& memory : memory_) memory.record_stream(stream);
    }
  }
  if (const cudaGraph_t graph = graph_being_captured()) hold_in(graph, shared_from_this());
}

at::Tensor DeviceBuffers::keep(const at::Tensor& memory) const {
  const std::lock_guard lock(mutex_);
  memory_.push_back(memory);
  for (const c10::Stream& stream : streams_) memory.record_stream(stream);
  return memory;
}

const int32_t* DeviceBuffers::keep(const std::vector<int32_t>& words, at::Device device) const {
  return keep(upload(words, device)).const_data_ptr<int32_t>();
}

void release_forgotten() {
  std::vector<Hold> items;
  {
    const std::lock_guard lock(forgotten().mutex);
    items.swap(forgotten().items);
  }
}

}  // namespace prunekernels::device

#endif
