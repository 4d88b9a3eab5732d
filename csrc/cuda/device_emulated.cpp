#include "cuda/device.h"

#if defined(PK_EMULATED)

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "cuda/forced_tiles.h"

namespace prunekernels::device {
namespace {

bool pretends_to_capture = false, runs_nothing = false;
std::string events;  // what happened since the tests last asked: launchers, "upload", "download"

void note(const char* event) { events.append(events.empty() ? "" : " ").append(event); }

}  // namespace

// From now on, what CUDA refuses while a graph is captured raises.
PK_FOR_TESTS void pk_pretend_to_capture(bool pretend) { pretends_to_capture = pretend; }

// From now on, the device is one that this build has no kernels for.
PK_FOR_TESTS void pk_pretend_another_gpu(bool pretend) { runs_nothing = pretend; }

PK_FOR_TESTS const char* pk_take_events() {
  static std::string taken;
  taken = std::move(events);
  events.clear();
  return taken.c_str();
}

void check_launch(cudaError_t status, const char* op, const char* launcher) {
  note(launcher);
  TORCH_CHECK(status == cudaSuccess, op, ": ", launcher, ": ", cudaGetErrorString(status), "; ", simt::take_report());
}

cudaStream_t current_stream() { return nullptr; }

int multiprocessors() { return 4; }  // few, so that small problems are cut into several slices

bool multiplies_by_warpgroups() { return true; }

bool runs_kernels() { return !runs_nothing; }

bool capturing() { return pretends_to_capture; }

bool allows_tf32() { return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV); }

bool tunes_vendor() { return at::globalContext().benchmarkCuDNN(); }

double milliseconds(c10::function_ref<void()> work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

at::Tensor upload(const std::vector<int32_t>& words, at::Device) {
  note("upload");
  const at::Tensor there = at::empty({static_cast<int64_t>(words.size())}, at::kInt);
  std::copy(words.begin(), words.end(), there.mutable_data_ptr<int32_t>());
  return there;
}

std::vector<int32_t> download(const at::Tensor& words) {
  note("download");
  const at::Tensor here = words.contiguous();
  return {here.const_data_ptr<int32_t>(), here.const_data_ptr<int32_t>() + here.numel()};
}

void DeviceBuffers::used_here() const {}

at::Tensor DeviceBuffers::keep(const at::Tensor& memory) const {
  const std::lock_guard lock(mutex_);
  memory_.push_back(memory);
  return memory;
}

const int32_t* DeviceBuffers::keep(const std::vector<int32_t>& words, at::Device device) const {
  return keep(upload(words, device)).const_data_ptr<int32_t>();
}

void release_forgotten() {}

}  // namespace prunekernels::device

#endif
