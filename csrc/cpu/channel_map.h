// A list of live channels, ready to gather from and scatter into activations of either layout, with torch's threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/kernels/gather_scatter.h"

namespace prunekernels {

class ChannelMap {
 public:
  ChannelMap(const int32_t* index, int64_t live, int64_t channels, bool padded);

  bool identity() const { return live_ == channels_ && !padded_; }
  int64_t live() const { return live_; }
  ChannelList list() const;  // valid as long as the map

  // Both tensors dense in the same memory format; full [n, channels, H, W], compact [n, live, H, W].
  void gather(const at::Tensor& full, const at::Tensor& compact) const;
  void scatter(const at::Tensor& compact, const at::Tensor& full) const;

 private:
  const int32_t* index_;
  int64_t live_, channels_;
  bool padded_;
  std::vector<int32_t> slot_;
  std::vector<uint64_t> bits_;
};

}  // namespace prunekernels
