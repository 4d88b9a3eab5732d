#include "cuda/plain_conv.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>

#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

at::Tensor where(const at::Tensor& live, const at::Tensor& x) { return at::where(live, x, at::Scalar(0)); }

at::Tensor filter_slots(const at::Tensor& table, const ConvShape& s) {  // [K, 1, 1]
  return table.narrow(0, kHeaderWords + s.K, s.K).view({s.K, 1, 1});
}

at::Tensor read_channels(const at::Tensor& table, const ConvShape& s) {  // bool [C, 1, 1]
  return table.narrow(0, kHeaderWords + 2 * s.K + s.C, s.C).view({s.C, 1, 1}).ge(0);
}

at::Tensor live_kernels(const at::Tensor& table, const ConvShape& s) {  // bool [K, C / G, 1, 1]
  const int64_t Cg = s.channels_per_group(), row = pair_words(Cg);
  const at::Tensor words = table.narrow(0, kHeaderWords + 2 * s.K + 2 * s.C, s.K * row).view({s.K, row, 1});
  const at::Tensor bits = words.bitwise_right_shift(at::arange(32, words.options())).bitwise_and(1);
  return bits.view({s.K, row * 32}).narrow(1, 0, Cg).ne(0).view({s.K, Cg, 1, 1});
}

}  // namespace

at::Tensor PlainConv::forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) const {
  if (!table) return vendor::conv(x, weight, bias, params, params.groups).contiguous(format);
  const at::Tensor filters = filter_slots(*table, shape).ne(kDead);
  const OptionalTensor b = bias ? OptionalTensor(where(filters.view({-1}), *bias)) : std::nullopt;
  const at::Tensor w = where(live_kernels(*table, shape), weight).contiguous(format);
  const at::Tensor y = vendor::conv(where(read_channels(*table, shape), x), w, b, params, params.groups);
  return where(filters, y).contiguous(format);
}

at::Tensor PlainConv::grad_input(const at::Tensor& grad_out, const at::Tensor& weight) const {
  const at::Tensor like_x = at::empty({shape.N, shape.C, shape.H, shape.W}, grad_out.options().memory_format(format));
  if (!table) return vendor::grad_input(grad_out, like_x, weight, params, params.groups).contiguous(format);
  const at::Tensor w = where(live_kernels(*table, shape), weight).contiguous(format);
  const at::Tensor grad = where(filter_slots(*table, shape).ge(0), grad_out);
  const at::Tensor grad_x = vendor::grad_input(grad, like_x, w, params, params.groups);
  return where(read_channels(*table, shape), grad_x).contiguous(format);
}

at::Tensor PlainConv::grad_weight(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& weight,
                                  const OptionalTensor& scale) const {
  at::Tensor grad = vendor::grad_weight(grad_out, x, weight.contiguous(format), params, params.groups);
  if (table) grad = where(live_kernels(*table, shape), grad);
  if (scale) {
    const at::Tensor rows = scale->view({-1, 1, 1, 1});
    grad = where(rows.ne(0), grad.mul(rows.to(grad.scalar_type())));
  }
  return grad.contiguous(weight.suggest_memory_format());
}

}  // namespace prunekernels
