#include "cuda/plain_conv.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/where.h>

#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

at::Tensor where(const at::Tensor& live, const at::Tensor& x) { return at::where(live, x, at::Scalar(0)); }

at::Tensor filter_slots(const DeviceMask& mask) {  // [K, 1, 1]
  const int64_t K = mask.table()[kFilters];
  return mask.words().narrow(0, kHeaderWords + K, K).view({K, 1, 1});
}

at::Tensor read_channels(const DeviceMask& mask) {  // bool [C, 1, 1]
  const int64_t K = mask.table()[kFilters], C = mask.table()[kChannels];
  return mask.words().narrow(0, kHeaderWords + 2 * K + C, C).view({C, 1, 1}).ge(0);
}

at::Tensor live_kernels(const DeviceMask& mask) {  // bool [K, C / G, 1, 1]
  const int64_t K = mask.table()[kFilters], C = mask.table()[kChannels], per_group = mask.table().channels_per_group();
  const int64_t row = pair_words(per_group);
  const at::Tensor words = mask.words().narrow(0, kHeaderWords + 2 * K + 2 * C, K * row).view({K, row, 1});
  const at::Tensor bits = words.bitwise_right_shift(at::arange(32, words.options())).bitwise_and(1);
  return bits.view({K, row * 32}).narrow(1, 0, per_group).ne(0).view({K, per_group, 1, 1});
}

}  // namespace

at::Tensor plain_forward(const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
                         const OptionalTensor& bias) {
  const at::Tensor filters = filter_slots(call.mask).ne(kDead);
  const OptionalTensor b = bias ? OptionalTensor(where(filters.view({-1}), *bias)) : std::nullopt;
  const at::Tensor w = where(live_kernels(call.mask), weight).contiguous(call.format);
  const at::Tensor live_x = where(read_channels(call.mask), x);
  return where(filters, vendor::conv(live_x, w, b, call.params, call.params.groups)).contiguous(call.format);
}

at::Tensor plain_grad_input(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& weight) {
  const ConvShape& s = call.shape;
  const at::Tensor like_x = call.empty({s.N, s.C, s.H, s.W}, grad_out);
  const at::Tensor w = where(live_kernels(call.mask), weight).contiguous(call.format);
  const at::Tensor grad = where(filter_slots(call.mask).ge(0), grad_out);
  const at::Tensor grad_x = vendor::grad_input(grad, like_x, w, call.params, call.params.groups);
  return where(read_channels(call.mask), grad_x).contiguous(call.format);
}

void mask_grad_of_doubles(const at::Tensor& grad, const DeviceMask* mask, const OptionalTensor& scale) {
  at::Tensor masked = mask ? where(live_kernels(*mask), grad) : grad;
  if (scale) {
    const at::Tensor rows = scale->view({-1, 1, 1, 1});
    masked = where(rows.ne(0), masked.mul(rows.to(masked.scalar_type())));
  }
  grad.copy_(masked);
}

}  // namespace prunekernels
