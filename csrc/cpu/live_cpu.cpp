// regroup_channels, join_channels, pack_weight and unpack_grad_weight on CPU.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/caching_allocator.h"
#include "cpu/channel_map.h"
#include "cpu/compact_conv.h"
#include "cpu/kernels/join.h"
#include "cpu/tensor_access.h"
#include "ops/conv_args.h"

namespace prunekernels {
namespace {

constexpr int64_t kGrainBytes = 32 << 10;  // less than this per thread is not worth waking it

// int32 [any]: ascending places below `channels`, and -1 between them. Made by LiveList, which keeps each for its life.
const int32_t* check_places(const char* op, const char* argument, const at::Tensor& index, int64_t channels) {
  PK_CHECK(index.device().is_cpu() && index.scalar_type() == at::kInt && index.dim() == 1 && index.is_contiguous(), op,
           argument, "contiguous int32 [channels] on the CPU", index.dtype(), " ", index.sizes(), " on ",
           index.device());
  const int32_t* at = index.const_data_ptr<int32_t>();
  for (int64_t j = 0, last = -1; j < index.numel(); ++j) {
    const int64_t place = at[j];
    PK_CHECK(place == -1 || (place > last && place < channels), op, argument,
             c10::str("ascending places below ", channels, ", or -1"), place, " at position ", j);
    last = std::max(last, place);
  }
  return at;
}

bool has_gaps(const at::Tensor& places) {
  const int32_t* at = places.const_data_ptr<int32_t>();
  return std::find(at, at + places.numel(), -1) != at + places.numel();
}

at::Tensor regroup_channels(const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse) {
  constexpr const char* op = "regroup_channels";
  check_dtype(op, "x", x, x);
  PK_CHECK(x.dim() == 4, op, "x", "a 4-D tensor [N, C, H, W]", x.sizes());
  PK_CHECK(inverse.numel() == x.size(1), op, "inverse", "one place per channel of x", inverse.sizes(), " for ",
           x.sizes());
  const int32_t* places = check_places(op, "index", index, x.size(1));
  check_places(op, "inverse", inverse, index.numel());
  const at::MemoryFormat format = x.suggest_memory_format();
  const at::Tensor y = empty_cached({x.size(0), index.numel(), x.size(2), x.size(3)}, x.options(), format);
  if (y.numel() == 0) return y;
  if (x.size(1) == 0) return y.zero_();
  ChannelMap(places, index.numel(), x.size(1), has_gaps(index)).gather(x.contiguous(format), y);
  return y;
}

// One operand of a join in NHWC, pixel by pixel at the union's width.
class Spread {
 public:
  Spread(const at::Tensor& operand, const at::Tensor& places, int64_t channels)
      : map_(places.const_data_ptr<int32_t>(), places.numel(), channels, has_gaps(places)),
        list_(map_.list()),
        copy_(pick_scatter_pixels(operand.element_size(), list_)),
        from_(static_cast<const char*>(operand.const_data_ptr())),
        bytes_(operand.element_size()) {}
  Spread(const Spread&) = delete;  // list_ points into map_

  // Pixels first..first + count: where they lie, or else in buffer.
  const char* pixels(int64_t first, int64_t count, std::vector<char>& buffer) const {
    const char* from = from_ + first * list_.live * bytes_;
    if (map_.identity()) return from;
    buffer.resize(count * list_.channels * bytes_);
    copy_(from, buffer.data(), 0, count, list_);
    return buffer.data();
  }

 private:
  ChannelMap map_;
  ChannelList list_;
  PixelCopy copy_;
  const char* from_;
  int64_t bytes_;
};

template <typename T>
void join_pixels(const Spread& a, const Spread& b, T* y, int64_t channels, double alpha, int64_t begin, int64_t end) {
  constexpr int64_t kBlockBytes = 8 << 10;  // two of them and the result stay in L1
  const int64_t block = std::max<int64_t>(1, kBlockBytes / (channels * static_cast<int64_t>(sizeof(T))));
  std::vector<char> a_buffer, b_buffer;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = std::min(block, end - first);
    const auto* from_a = reinterpret_cast<const T*>(a.pixels(first, count, a_buffer));
    const auto* from_b = reinterpret_cast<const T*>(b.pixels(first, count, b_buffer));
    join_run(from_a, from_b, y + first * channels, count * channels, alpha);
  }
}

at::Tensor join_channels(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_index, const at::Tensor& b_index,
                         const at::Tensor& a_inverse, const at::Tensor& b_inverse, double alpha) {
  constexpr const char* op = "join_channels";
  check_dtype(op, "a", a, a);
  check_dtype(op, "b", b, a);
  PK_CHECK(a.dim() == 4, op, "a", "a 4-D tensor [N, C, H, W]", a.sizes());
  PK_CHECK(b.dim() == 4 && b.size(0) == a.size(0) && b.sizes().slice(2) == a.sizes().slice(2), op, "b",
           c10::str("the sizes of a but for its channels, ", a.sizes()), b.sizes());
  const int64_t channels = a_index.numel();
  const JoinList list{check_places(op, "a_index", a_index, a.size(1)), check_places(op, "b_index", b_index, b.size(1)),
                      channels, a.size(1), b.size(1)};
  PK_CHECK(b_index.numel() == channels, op, "b_index", c10::str("[", channels, "], as a_index"), b_index.sizes());
  PK_CHECK(a_inverse.numel() == a.size(1) && b_inverse.numel() == b.size(1), op, "a_inverse, b_inverse",
           "one place per channel of a and of b", a_inverse.sizes(), ", ", b_inverse.sizes());
  check_places(op, "a_inverse", a_inverse, channels), check_places(op, "b_inverse", b_inverse, channels);
  // One channel is dense in both formats, so the wider operand decides.
  const at::MemoryFormat format = (a.size(1) >= b.size(1) ? a : b).suggest_memory_format();
  const at::Tensor x = a.contiguous(format), z = b.contiguous(format);
  const at::Tensor y = empty_cached({a.size(0), channels, a.size(2), a.size(3)}, a.options(), format);
  if (y.numel() == 0) return y;
  const int64_t pixels = a.size(2) * a.size(3), bytes = a.element_size();
  const bool planes = format == at::MemoryFormat::Contiguous;
  const int64_t items = a.size(0) * (planes ? channels : pixels), item_bytes = bytes * (planes ? pixels : channels);
  const Spread spread_a(x, a_inverse, channels), spread_b(z, b_inverse, channels);
  with_element(a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto grain = std::max<int64_t>(1, kGrainBytes / item_bytes);
    at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
      if (planes)
        join_planes(const_elements<T>(x), const_elements<T>(z), elements<T>(y), pixels, alpha, begin, end, list);
      else
        join_pixels(spread_a, spread_b, elements<T>(y), channels, alpha, begin, end);
    });
  });
  return y;
}

// All that moving weights asks of a shape; sizes of activations play no part.
ConvShape weight_shape(const MaskTable& mask, c10::IntArrayRef kernel) {
  ConvShape s{};
  s.K = mask[kFilters], s.C = mask[kChannels], s.G = mask[kGroups], s.R = kernel[0], s.S = kernel[1];
  return s;
}

MaskTable whole_table(const char* op, const at::Tensor& table, int64_t filters, int64_t channels_per_group) {
  check_table_tensor(op, "mask", table, at::kCPU);
  const int32_t* words = table.const_data_ptr<int32_t>();
  check_table_words(op, "mask", words, table.numel());
  const MaskTable mask(words);
  PK_CHECK(mask[kFilters] == filters && mask.channels_per_group() == channels_per_group, op, "mask",
           c10::str("a table of ", filters, " filters and ", channels_per_group, " channels per group"), mask[kFilters],
           " and ", mask.channels_per_group());
  PK_CHECK(mask[kPairsFull] && !mask[kRagged], op, "mask", "lists of whole filters and channels",
           "single dead kernels");
  return mask;
}

at::Tensor packed_weight(const at::Tensor& weight, const at::Tensor& table, int64_t filters, int64_t channels) {
  constexpr const char* op = "pack_weight";
  check_dtype(op, "weight", weight, weight);
  PK_CHECK(weight.dim() == 4, op, "weight", "a 4-D tensor [K, C / groups, R, S]", weight.sizes());
  const MaskTable mask = whole_table(op, table, weight.size(0), weight.size(1));
  PK_CHECK(mask.out_count() == filters && mask[kInPerGroup] == channels, op, "filters, channels",
           c10::str(mask.out_count(), ", ", mask[kInPerGroup], " as the table has"), filters, ", ", channels);
  const ConvShape shape = weight_shape(mask, weight.sizes().slice(2));
  return CompactConv(shape, mask, weight.suggest_memory_format()).pack_weight(weight);
}

at::Tensor unpacked_grad_weight(const at::Tensor& grad, const at::Tensor& table, int64_t filters, int64_t channels,
                                bool channels_last) {
  constexpr const char* op = "unpack_grad_weight";
  check_dtype(op, "grad", grad, grad);
  PK_CHECK(grad.dim() == 4, op, "grad", "a 4-D tensor", grad.sizes());
  const MaskTable mask = whole_table(op, table, filters, channels);
  PK_CHECK(grad.size(0) == mask.out_count() && grad.size(1) == mask[kInPerGroup], op, "grad",
           c10::str("[", mask.out_count(), ", ", mask[kInPerGroup], ", R, S]"), grad.sizes());
  const at::MemoryFormat format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const ConvShape shape = weight_shape(mask, grad.sizes().slice(2));
  return CompactConv(shape, mask, format)
      .unpack_grad_weight(grad, {filters, channels, shape.R, shape.S}, format, nullptr);
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("regroup_channels", regroup_channels);
  m.impl("join_channels", join_channels);
  m.impl("pack_weight", packed_weight);
  m.impl("unpack_grad_weight", unpacked_grad_weight);
}

}  // namespace prunekernels
