// gather_channels, scatter_channels and conv_mask on CPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "cpu/caching_allocator.h"
#include "cpu/channel_map.h"
#include "ops/conv_args.h"

namespace prunekernels {
namespace {

// The list, contiguous; strictly increasing and in range, so that gather and scatter are each other's adjoint.
at::Tensor check_index(const char* op, const at::Tensor& index, int64_t channels) {
  PK_CHECK(index.device().is_cpu() && index.scalar_type() == at::kInt && index.dim() == 1, op, "index",
           "int32 [live] on the CPU", index.dtype(), " ", index.sizes(), " on ", index.device());
  const at::Tensor list = index.contiguous();
  const int32_t* at = list.const_data_ptr<int32_t>();
  for (int64_t j = 0; j < list.numel(); ++j)
    PK_CHECK(at[j] >= 0 && at[j] < channels && (j == 0 || at[j] > at[j - 1]), op, "index",
             "strictly increasing channels below " + std::to_string(channels), at[j], " at position ", j);
  return list;
}

at::Tensor gather_channels(const at::Tensor& x, const at::Tensor& index) {
  constexpr const char* op = "gather_channels";
  check_dtype(op, "x", x, x);
  PK_CHECK(x.dim() == 4, op, "x", "a 4-D tensor [N, C, H, W]", x.sizes());
  const at::Tensor list = check_index(op, index, x.size(1));
  const at::MemoryFormat format = x.suggest_memory_format();
  const at::Tensor compact = empty_cached({x.size(0), list.numel(), x.size(2), x.size(3)}, x.options(), format);
  if (compact.numel() == 0) return compact;
  ChannelMap(list.const_data_ptr<int32_t>(), list.numel(), x.size(1), false).gather(x.contiguous(format), compact);
  return compact;
}

at::Tensor scatter_channels(const at::Tensor& x, const at::Tensor& index, int64_t channels) {
  constexpr const char* op = "scatter_channels";
  check_dtype(op, "x", x, x);
  PK_CHECK(x.dim() == 4, op, "x", "a 4-D tensor [N, live, H, W]", x.sizes());
  const at::Tensor list = check_index(op, index, channels);
  PK_CHECK(x.size(1) == list.numel(), op, "x", std::to_string(list.numel()) + " channels, one per index", x.sizes());
  const at::MemoryFormat format = x.suggest_memory_format();
  const at::Tensor full = empty_cached({x.size(0), channels, x.size(2), x.size(3)}, x.options(), format);
  if (full.numel() == 0) return full;
  ChannelMap(list.const_data_ptr<int32_t>(), list.numel(), channels, false).scatter(x.contiguous(format), full);
  return full;
}

const bool* mask_data(const char* argument, std::optional<at::Tensor>& mask, c10::IntArrayRef expected) {
  if (!mask) return nullptr;
  PK_CHECK(mask->scalar_type() == at::kBool && mask->sizes() == expected, "conv_mask", argument,
           c10::str("bool ", expected), mask->dtype(), " ", mask->sizes());
  PK_CHECK(mask->device().is_cpu(), "conv_mask", argument, "a tensor on the CPU", mask->device());
  mask = mask->contiguous();
  return mask->const_data_ptr<bool>();
}

at::Tensor conv_mask(std::optional<at::Tensor> filter, std::optional<at::Tensor> kernel,
                     std::optional<at::Tensor> input, int64_t K, int64_t C, int64_t G) {
  constexpr const char* op = "conv_mask";
  PK_CHECK(K >= 0 && C >= 0, op, "out_channels, in_channels", "no negative number", K, ", ", C);
  PK_CHECK(G >= 1 && C % G == 0 && K % G == 0, op, "groups",
           "a divisor of " + std::to_string(K) + " filters and " + std::to_string(C) + " input channels", G);
  const bool* f = mask_data("filter_mask", filter, {K});
  const bool* k = mask_data("kernel_mask", kernel, {K, C / G});
  const bool* i = mask_data("input_mask", input, {C});
  const at::Tensor table = at::empty({mask_table_words(K, C, G)}, at::TensorOptions().dtype(at::kInt));
  build_mask_table(f, k, i, K, C, G, table.mutable_data_ptr<int32_t>());
  return table;
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("gather_channels", gather_channels);
  m.impl("scatter_channels", scatter_channels);
}

// Without a mask there is no tensor to choose a device by; masks of another device are refused with a message instead
// of a dispatch error.
TORCH_LIBRARY_IMPL(prunekernels, CompositeExplicitAutograd, m) { m.impl("conv_mask", conv_mask); }

}  // namespace prunekernels
