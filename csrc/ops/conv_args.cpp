#include "ops/conv_args.h"

#include "check.h"

namespace prunekernels {
namespace {

void check_pair(const char* op, const char* argument, c10::IntArrayRef value, int64_t least) {
  PK_CHECK(value.size() == 2 && value[0] >= least && value[1] >= least, op, argument,
           "two integers, each at least " + std::to_string(least), value);
}

}  // namespace

ConvShape make_shape(const char* op, c10::IntArrayRef x_size, const at::Tensor& weight, const ConvParams& params) {
  PK_CHECK(x_size.size() == 4, op, "x", "a 4-D tensor [N, C, H, W]", x_size);
  PK_CHECK(weight.dim() == 4, op, "weight", "a 4-D tensor [K, C / groups, R, S]", weight.sizes());
  check_pair(op, "stride", params.stride, 1);
  check_pair(op, "padding", params.padding, 0);
  check_pair(op, "dilation", params.dilation, 1);
  PK_CHECK(params.groups >= 1, op, "groups", "at least 1", params.groups);
  ConvShape s;
  s.N = x_size[0], s.C = x_size[1], s.H = x_size[2], s.W = x_size[3];
  s.K = weight.size(0), s.R = weight.size(2), s.S = weight.size(3), s.G = params.groups;
  PK_CHECK(s.C % s.G == 0, op, "groups", "a divisor of the " + std::to_string(s.C) + " input channels", s.G);
  PK_CHECK(s.K % s.G == 0, op, "groups", "a divisor of the " + std::to_string(s.K) + " filters", s.G);
  PK_CHECK(
      weight.size(1) == s.C / s.G, op, "weight",
      std::to_string(s.C / s.G) + " channels (" + std::to_string(s.C) + " in x / " + std::to_string(s.G) + " groups)",
      weight.sizes());
  for (int i = 0; i < 2; ++i)
    s.stride[i] = params.stride[i], s.padding[i] = params.padding[i], s.dilation[i] = params.dilation[i];
  s.P = conv_out_size(s.H, s.R, s.stride[0], s.padding[0], s.dilation[0]);
  s.Q = conv_out_size(s.W, s.S, s.stride[1], s.padding[1], s.dilation[1]);
  PK_CHECK(s.P > 0 && s.Q > 0, op, "weight", "a kernel no larger than the padded input", weight.sizes(), " for x ",
           x_size, ", padding ", params.padding, ", dilation ", params.dilation);
  return s;
}

void check_dtype(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& like) {
  const auto type = tensor.scalar_type();
  PK_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op, argument,
           "float32, float64, bfloat16 or float16", tensor.dtype());
  PK_CHECK(type == like.scalar_type(), op, argument, like.dtype(), tensor.dtype());
  PK_CHECK(tensor.device() == like.device(), op, argument, like.device(), tensor.device());
}

void check_grad_out(const char* op, const at::Tensor& grad_out, const ConvShape& s) {
  const c10::SmallVector<int64_t, 4> expected{s.N, s.K, s.P, s.Q};
  PK_CHECK(grad_out.sizes() == c10::IntArrayRef(expected), op, "grad_out", c10::IntArrayRef(expected),
           grad_out.sizes());
}

void check_scale(const char* op, const std::optional<at::Tensor>& scale, int64_t K, at::Device device) {
  if (!scale) return;
  PK_CHECK(scale->scalar_type() == at::kFloat && scale->dim() == 1 && scale->size(0) == K && scale->device() == device,
           op, "grad_scale", "float32 [" + std::to_string(K) + "] on " + device.str(), scale->dtype(), " ",
           scale->sizes(), " on ", scale->device());
}

void check_table_tensor(const char* op, const char* argument, const at::Tensor& mask, at::Device device) {
  PK_CHECK(mask.device() == device && mask.scalar_type() == at::kInt && mask.is_contiguous() && mask.dim() == 1 &&
               mask.size(0) >= kHeaderWords,
           op, argument, "a table made by conv_mask (int32 on " + (device.is_cpu() ? "the CPU" : device.str()) + ")",
           mask.dtype(), " ", mask.sizes(), " on ", mask.device());
}

void check_table_words(const char* op, const char* argument, const int32_t* words, int64_t count) {
  const MaskTable table(words);
  PK_CHECK(table[kMagic] == kTableMagic && table[kGroups] >= 1 &&
               count == mask_table_words(table[kFilters], table[kChannels], table[kGroups]),
           op, argument, "a table made by conv_mask", "other int32 values, [", count, "]");
}

void check_table_sizes(const char* op, const char* argument, const MaskTable& table, int64_t K, int64_t C, int64_t G) {
  PK_CHECK(table[kFilters] == K && table[kChannels] == C && table[kGroups] == G, op, argument,
           "a table of " + std::to_string(K) + " filters, " + std::to_string(C) + " channels, " + std::to_string(G) +
               " groups",
           table[kFilters], ", ", table[kChannels], ", ", table[kGroups]);
}

void check_table_filters(const char* op, const char* argument, const MaskTable& table, int64_t K) {
  PK_CHECK(table[kFilters] == K, op, argument, "a table of " + std::to_string(K) + " filters", table[kFilters]);
}

namespace {

MaskTable read_table(const char* op, const char* argument, const at::Tensor& mask) {
  check_table_tensor(op, argument, mask, at::kCPU);
  const int32_t* words = mask.const_data_ptr<int32_t>();
  check_table_words(op, argument, words, mask.size(0));
  return MaskTable(words);
}

}  // namespace

std::optional<MaskTable> read_mask(const char* op, const char* argument, const std::optional<at::Tensor>& mask,
                                   int64_t K, int64_t C, int64_t G) {
  if (!mask) return std::nullopt;
  const MaskTable table = read_table(op, argument, *mask);
  check_table_sizes(op, argument, table, K, C, G);
  return table;
}

std::optional<MaskTable> read_filter_mask(const char* op, const char* argument, const std::optional<at::Tensor>& mask,
                                          int64_t K) {
  if (!mask) return std::nullopt;
  const MaskTable table = read_table(op, argument, *mask);
  check_table_filters(op, argument, table, K);
  return table;
}

}  // namespace prunekernels
