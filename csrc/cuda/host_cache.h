// Host copies of small int32 tensors that live on the device (mask tables, channel lists), and what is derived of them:
// made once for each change of the tensor's contents, so that a training step never waits for the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <memory>
#include <vector>

#include "cuda/device.h"

namespace prunekernels::host_cache {

using Build = c10::function_ref<std::shared_ptr<const device::DeviceBuffers>(const std::vector<int32_t>& words)>;

// What build made of the tensor's present words; `parameter`: whatever else it depends on. Known by the tensor's
// storage, place and version, so an edit that torch does not count (through .data, say) goes unseen. A tensor made in
// inference mode has no version and is read anew each time. An unknown tensor raises while a graph is captured. The
// graph holds what it was captured with: it goes on with the masks of that moment, whatever happens to the tensor.
std::shared_ptr<const device::DeviceBuffers> find(const char* op, const char* argument, const at::Tensor& words,
                                                  int64_t parameter, Build build);

}  // namespace prunekernels::host_cache
