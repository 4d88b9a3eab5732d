// gather_channels and scatter_channels on the device.
#include <ATen/DeviceGuard.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "core/mask_table.h"
#include "cuda/host_cache.h"
#include "cuda/kernels/channel_copy.h"
#include "ops/conv_args.h"

namespace prunekernels {
namespace {

// A list of channels among so many, checked once and kept with its inverse.
class ChannelIndex : public device::DeviceBuffers {
 public:
  ChannelIndex(const char* op, const std::vector<int32_t>& list, int64_t channels, at::Device device)
      : live_(static_cast<int64_t>(list.size())) {
    std::vector<int32_t> words = list;
    words.resize(live_ + channels, kDead);
    for (int64_t j = 0; j < live_; ++j) {
      const int32_t c = list[j];
      PK_CHECK(c >= 0 && c < channels && (j == 0 || c > list[j - 1]), op, "index",
               "strictly increasing channels below " + std::to_string(channels), c, " at position ", j);
      words[live_ + c] = static_cast<int32_t>(j);
    }
    granule_ = channel_granule(list.data(), live_, channels);
    index_ = keep(words, device);
  }

  int64_t live() const { return live_; }
  int64_t granule() const { return granule_; }
  const int32_t* index() const { return index_; }         // device [live]
  const int32_t* slot() const { return index_ + live_; }  // device [channels]

 private:
  int64_t live_, granule_;
  const int32_t* index_;
};

std::shared_ptr<const ChannelIndex> read_index(const char* op, const at::Tensor& index, int64_t channels,
                                               at::Device device) {
  PK_CHECK(index.device() == device && index.scalar_type() == at::kInt && index.dim() == 1, op, "index",
           "int32 [live] on " + device.str(), index.dtype(), " ", index.sizes(), " on ", index.device());
  return std::static_pointer_cast<const ChannelIndex>(
      host_cache::find(op, "index", index, channels, [&](const std::vector<int32_t>& list) {
        return std::make_shared<const ChannelIndex>(op, list, channels, device);
      }));
}

ChannelCopy channel_copy(const at::Tensor& x, int64_t full, const ChannelIndex& index, at::MemoryFormat format) {
  return {x.size(0),
          x.size(2) * x.size(3),
          full,
          index.live(),
          static_cast<int>(x.element_size()),
          format == at::MemoryFormat::ChannelsLast,
          index.granule()};
}

at::Tensor gather_channels(const at::Tensor& x, const at::Tensor& index) {
  constexpr const char* op = "gather_channels";
  const at::DeviceGuard guard(x.device());
  check_dtype(op, "x", x, x);
  PK_CHECK(x.dim() == 4, op, "x", "a 4-D tensor [N, C, H, W]", x.sizes());
  const auto list = read_index(op, index, x.size(1), x.device());
  const at::MemoryFormat format = x.suggest_memory_format();
  const at::Tensor compact =
      at::empty({x.size(0), list->live(), x.size(2), x.size(3)}, x.options().memory_format(format));
  if (compact.numel() == 0) return compact;
  const at::Tensor full = x.contiguous(format);
  PK_LAUNCH(op, launch_gather_channels, full.const_data_ptr(), list->index(), compact.mutable_data_ptr(),
            channel_copy(x, x.size(1), *list, format), device::current_stream());
  return compact;
}

at::Tensor scatter_channels(const at::Tensor& x, const at::Tensor& index, int64_t channels) {
  constexpr const char* op = "scatter_channels";
  const at::DeviceGuard guard(x.device());
  check_dtype(op, "x", x, x);
  PK_CHECK(x.dim() == 4, op, "x", "a 4-D tensor [N, live, H, W]", x.sizes());
  const auto list = read_index(op, index, channels, x.device());
  PK_CHECK(x.size(1) == list->live(), op, "x", std::to_string(list->live()) + " channels, one per index", x.sizes());
  const at::MemoryFormat format = x.suggest_memory_format();
  const at::Tensor full = at::empty({x.size(0), channels, x.size(2), x.size(3)}, x.options().memory_format(format));
  if (full.numel() == 0) return full;
  const at::Tensor compact = x.contiguous(format);
  PK_LAUNCH(op, launch_scatter_channels, compact.const_data_ptr(), list->slot(), full.mutable_data_ptr(),
            channel_copy(x, channels, *list, format), device::current_stream());
  return full;
}

}  // namespace

PK_DEVICE_OPERATORS(m) {
  m.impl("gather_channels", gather_channels);
  m.impl("scatter_channels", scatter_channels);
}

}  // namespace prunekernels
