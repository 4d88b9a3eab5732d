// regroup_channels, join_channels, pack_weight and unpack_grad_weight on the device. Doubles, which nothing here is
// made for, go through torch where more is asked than moving bits.
#include <ATen/DeviceGuard.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "check.h"
#include "cuda/conv_call.h"
#include "cuda/host_cache.h"
#include "cuda/kernels/channel_copy.h"

namespace prunekernels {
namespace {

// Places among so many channels, or -1; checked once.
class Places : public device::DeviceBuffers {
 public:
  Places(const char* op, const char* argument, const std::vector<int32_t>& list, int64_t channels, at::Device device)
      : count_(static_cast<int64_t>(list.size())), granule_(channel_granule(list.data(), count_, channels)) {
    for (int64_t j = 0; j < count_; ++j)
      PK_CHECK(list[j] >= -1 && list[j] < channels, op, argument, c10::str("places below ", channels, ", or -1"),
               list[j], " at position ", j);
    index_ = keep(list, device);
  }

  int64_t count() const { return count_; }
  int64_t granule() const { return granule_; }
  const int32_t* index() const { return index_; }  // device [count]

 private:
  int64_t count_, granule_;
  const int32_t* index_;
};

std::shared_ptr<const Places> read_places(const char* op, const char* argument, const at::Tensor& index,
                                          int64_t channels, at::Device device) {
  PK_CHECK(index.device() == device && index.scalar_type() == at::kInt && index.dim() == 1, op, argument,
           "int32 [channels] on " + device.str(), index.dtype(), " ", index.sizes(), " on ", index.device());
  const int64_t parameter = -2 - channels;  // no other user of host_cache::find gives numbers below -1
  return std::static_pointer_cast<const Places>(
      host_cache::find(op, argument, index, parameter, [&](const std::vector<int32_t>& list) {
        return std::make_shared<const Places>(op, argument, list, channels, device);
      }));
}

// x: dense in the format
at::Tensor regrouped(const char* op, const at::Tensor& x, const Places& places, at::MemoryFormat format) {
  const int64_t from = x.size(1), to = places.count();
  const at::Tensor y = at::empty({x.size(0), to, x.size(2), x.size(3)}, x.options().memory_format(format));
  ChannelCopy copy{x.size(0),
                   x.size(2) * x.size(3),
                   from,
                   to,
                   static_cast<int>(x.element_size()),
                   format == at::MemoryFormat::ChannelsLast,
                   places.granule()};
  const void* const source = x.const_data_ptr();
  if (to <= from) {
    PK_LAUNCH(op, launch_gather_channels, source, places.index(), y.mutable_data_ptr(), copy, device::current_stream());
  } else {
    std::swap(copy.full, copy.compact);
    PK_LAUNCH(op, launch_scatter_channels, source, places.index(), y.mutable_data_ptr(), copy,
              device::current_stream());
  }
  return y;
}

at::Tensor regroup_channels(const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse) {
  constexpr const char* op = "regroup_channels";
  const at::DeviceGuard guard(x.device());
  check_dtype(op, "x", x, x);
  PK_CHECK(x.dim() == 4, op, "x", "a 4-D tensor [N, C, H, W]", x.sizes());
  PK_CHECK(inverse.numel() == x.size(1), op, "inverse", "one place per channel of x", inverse.sizes(), " for ",
           x.sizes());
  const auto places = read_places(op, "index", index, x.size(1), x.device());
  read_places(op, "inverse", inverse, places->count(), x.device());  // known before the backward pass
  const at::MemoryFormat format = x.suggest_memory_format();
  return regrouped(op, x.contiguous(format), *places, format);
}

at::Tensor join_channels(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_index, const at::Tensor& b_index,
                         const at::Tensor& a_inverse, const at::Tensor& b_inverse, double alpha) {
  constexpr const char* op = "join_channels";
  const at::DeviceGuard guard(a.device());
  check_dtype(op, "a", a, a);
  check_dtype(op, "b", b, a);
  PK_CHECK(a.dim() == 4, op, "a", "a 4-D tensor [N, C, H, W]", a.sizes());
  PK_CHECK(b.dim() == 4 && b.size(0) == a.size(0) && b.sizes().slice(2) == a.sizes().slice(2), op, "b",
           c10::str("the sizes of a but for its channels, ", a.sizes()), b.sizes());
  const auto in_a = read_places(op, "a_index", a_index, a.size(1), a.device());
  const auto in_b = read_places(op, "b_index", b_index, b.size(1), a.device());
  const int64_t channels = in_a->count();
  PK_CHECK(in_b->count() == channels, op, "b_index", c10::str("[", channels, "], as a_index"), b_index.sizes());
  PK_CHECK(a_inverse.numel() == a.size(1) && b_inverse.numel() == b.size(1), op, "a_inverse, b_inverse",
           "one place per channel of a and of b", a_inverse.sizes(), ", ", b_inverse.sizes());
  read_places(op, "a_inverse", a_inverse, channels, a.device());  // known before the backward pass
  read_places(op, "b_inverse", b_inverse, channels, a.device());

  // One channel is dense in both formats, so the wider operand decides.
  const at::MemoryFormat format = (a.size(1) >= b.size(1) ? a : b).suggest_memory_format();
  const at::Tensor x = a.contiguous(format), z = b.contiguous(format);
  if (a.scalar_type() == at::kDouble)
    return regrouped(op, x, *in_a, format).add_(regrouped(op, z, *in_b, format), alpha);
  const at::Tensor y = at::empty({a.size(0), channels, a.size(2), a.size(3)}, a.options().memory_format(format));
  PK_LAUNCH(op, launch_join, x.const_data_ptr(), in_a->index(), z.const_data_ptr(), in_b->index(), y.mutable_data_ptr(),
            {a.size(0), a.size(2) * a.size(3), a.size(1), b.size(1), channels, element_of(a.scalar_type()),
             format == at::MemoryFormat::ChannelsLast, static_cast<float>(alpha)},
            device::current_stream());
  return y;
}

// ---- weights

struct WholeMask {  // of whole filters and channels: the packed weight is [filters, channels, R, S]
  std::shared_ptr<const DeviceMask> lists;
  int64_t filters, channels;

  WholeMask(const char* op, const at::Tensor& table, int64_t full_filters, int64_t full_channels,
            const at::Tensor& like)
      : lists(device_mask(op, "mask", table, full_filters, -1, -1, like)),
        filters(lists->table().out_count()),
        channels(lists->table()[kInPerGroup]) {
    const MaskTable& mask = lists->table();
    PK_CHECK(mask.channels_per_group() == full_channels, op, "mask",
             c10::str("a table of ", full_filters, " filters and ", full_channels, " channels per group"),
             mask[kFilters], " and ", mask.channels_per_group());
    PK_CHECK(mask[kPairsFull] && !mask[kRagged], op, "mask", "lists of whole filters and channels",
             "single dead kernels");
  }
  int64_t filters_per_group() const { return lists->table()[kOutPerGroup]; }
  // All that moving weights asks of a shape; sizes of activations play no part.
  ConvShape shape(at::IntArrayRef kernel) const {
    const MaskTable& mask = lists->table();
    ConvShape s{};
    s.K = mask[kFilters], s.C = mask[kChannels], s.G = mask[kGroups], s.R = kernel[0], s.S = kernel[1];
    return s;
  }
};

// int64 [filters * channels]: where the packed weight's kernels lie among the full one's [K * C / G].
at::Tensor kernel_places(const WholeMask& mask, const at::Tensor& words) {
  const MaskTable& table = mask.lists->table();
  const int64_t groups = table[kLiveGroups], per_group = table.channels_per_group();
  const at::Tensor rows = words.narrow(0, kHeaderWords, mask.filters).to(at::kLong).view({groups, -1, 1});
  const at::Tensor columns = words.narrow(0, kHeaderWords + 2 * table[kFilters], groups * mask.channels)
                                 .to(at::kLong)
                                 .remainder(per_group)
                                 .view({groups, 1, -1});
  return rows.mul(per_group).add(columns).view({-1});
}

at::Tensor pack_weight(const at::Tensor& weight, const at::Tensor& table, int64_t filters, int64_t channels) {
  constexpr const char* op = "pack_weight";
  const at::DeviceGuard guard(weight.device());
  check_dtype(op, "weight", weight, weight);
  PK_CHECK(weight.dim() == 4, op, "weight", "a 4-D tensor [K, C / groups, R, S]", weight.sizes());
  const WholeMask mask(op, table, weight.size(0), weight.size(1), weight);
  PK_CHECK(mask.filters == filters && mask.channels == channels, op, "filters, channels",
           c10::str(mask.filters, ", ", mask.channels, " as the table has"), filters, ", ", channels);
  const ConvShape shape = mask.shape(weight.sizes().slice(2));
  const at::MemoryFormat format = weight.suggest_memory_format();
  if (filters == 0) return at::empty({filters, channels, shape.R, shape.S}, weight.options().memory_format(format));
  if (weight.scalar_type() == at::kDouble)
    return weight.reshape({-1, shape.R, shape.S})
        .index_select(0, kernel_places(mask, table))
        .view({filters, channels, shape.R, shape.S})
        .clone(format);  // 1x1 kernels are dense in both formats: contiguous() leaves them as they are
  const ConvParams none{};
  const CudaCall call{op, shape, none, *mask.lists, format, weight.scalar_type()};
  return packed_conv_weight(call, weight, mask.lists->pack(), mask.filters_per_group(), channels);
}

at::Tensor unpacked_grad_weight(const at::Tensor& grad, const at::Tensor& table, int64_t filters, int64_t channels,
                                bool channels_last) {
  constexpr const char* op = "unpack_grad_weight";
  const at::DeviceGuard guard(grad.device());
  check_dtype(op, "grad", grad, grad);
  PK_CHECK(grad.dim() == 4, op, "grad", "a 4-D tensor", grad.sizes());
  const WholeMask mask(op, table, filters, channels, grad);
  PK_CHECK(grad.size(0) == mask.filters && grad.size(1) == mask.channels, op, "grad",
           c10::str("[", mask.filters, ", ", mask.channels, ", R, S]"), grad.sizes());
  const ConvShape shape = mask.shape(grad.sizes().slice(2));
  const at::MemoryFormat format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const std::array<int64_t, 4> size{filters, channels, shape.R, shape.S};
  if (grad.scalar_type() == at::kDouble && mask.filters)
    return at::zeros({filters * channels, shape.R, shape.S}, grad.options())
        .index_copy_(0, kernel_places(mask, table), grad.reshape({-1, shape.R, shape.S}))
        .view(size)
        .clone(format);
  const at::Tensor full = at::empty(size, grad.options().memory_format(format));
  if (grad.numel() == 0) return full.zero_();
  const bool last = grad.is_contiguous(at::MemoryFormat::ChannelsLast);
  const ConvParams none{};
  const CudaCall call{op,
                      shape,
                      none,
                      *mask.lists,
                      last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous,
                      grad.scalar_type()};
  unpack_grad_weight_into(call, grad.contiguous(call.format), element_of(call.dtype), full, std::nullopt,
                          {last ? PackLayout::rows : PackLayout::channels, mask.filters_per_group(), mask.channels, 1});
  return full;
}

}  // namespace

PK_DEVICE_OPERATORS(m) {
  m.impl("regroup_channels", regroup_channels);
  m.impl("join_channels", join_channels);
  m.impl("pack_weight", pack_weight);
  m.impl("unpack_grad_weight", unpacked_grad_weight);
}

}  // namespace prunekernels
