// mask_grad_ and filter_norms on the device: all layers in a launch or a few. Doubles, which the kernels do not know,
// go through torch.
#include <ATen/DeviceGuard.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "cuda/conv_call.h"
#include "cuda/kernels/mask_grad.h"
#include "cuda/row_mask.h"

namespace prunekernels {
namespace {

std::vector<RowMask> read_masks(const char* op, const OptionalTensors& masks, const RowTensors& rows) {
  check_length(op, "masks", masks.size(), rows.size());
  return read_row_masks(op, masks, rows.tensors());
}

float* floats(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; }

MaskGradLayer make_layer(const char* op, const RowTensors& rows, size_t i, const RowMask& mask,
                         const MaskGradTensors& tensors) {
  MaskGradLayer layer{};
  layer.mask = mask.of_rows(op, rows[i], rows.layout(i));
  layer.grad = rows[i].mutable_data_ptr();
  layer.grad_scale = tensors.scale.defined() ? tensors.scale.const_data_ptr<float>() : nullptr;
  layer.weight = tensors.weight.defined() ? tensors.weight.const_data_ptr() : nullptr;
  layer.accumulated = floats(tensors.accumulated);
  layer.abs_sum = floats(tensors.abs_sum);
  layer.square_sum = floats(tensors.square_sum);
  layer.product_sum = floats(tensors.product_sum);
  return layer;
}

at::Tensor sum_of_rows(const at::Tensor& terms) { return terms.reshape({terms.size(0), -1}).sum(1); }

void mask_doubles(const at::Tensor& grad, const RowMask& mask, const MaskGradTensors& tensors, bool add_to_sums) {
  at::Tensor live = mask ? mask.live(grad) : at::ones_like(grad, at::kBool);
  at::Tensor g = grad;
  if (tensors.scale.defined()) {
    c10::SmallVector<int64_t, 5> size(grad.dim(), 1);
    size[0] = grad.size(0);
    const at::Tensor scale = tensors.scale.view(size);
    live = live.logical_and(scale.ne(0));
    g = g.mul(scale);
  }
  grad.copy_(at::where(live, g, 0));
  if (tensors.accumulated.defined()) tensors.accumulated.add_(grad);
  const auto put = [&](const at::Tensor& sums, const at::Tensor& terms) {
    add_to_sums ? sums.add_(sum_of_rows(terms)) : sums.copy_(sum_of_rows(terms));
  };
  if (tensors.abs_sum.defined()) put(tensors.abs_sum, grad.abs());
  if (tensors.square_sum.defined()) put(tensors.square_sum, grad.square());
  if (tensors.product_sum.defined()) put(tensors.product_sum, at::where(live, tensors.weight, 0).mul(grad));
}

void mask_grads(at::TensorList grads, const OptionalTensors& masks, const OptionalTensors& scales,
                at::TensorList weights, at::TensorList accumulated, at::TensorList abs_sums, at::TensorList square_sums,
                at::TensorList product_sums, bool add_to_sums) {
  constexpr const char* op = "mask_grad_";
  if (grads.empty()) return;
  const at::DeviceGuard guard(grads[0].device());
  const RowTensors rows(op, "grads", grads);
  const std::vector<RowMask> read = read_masks(op, masks, rows);
  const MaskGradArgs args(op, rows, {scales, weights, accumulated, abs_sums, square_sums, product_sums});
  if (rows.type() == at::kDouble) {
    for (size_t i = 0; i < rows.size(); ++i) mask_doubles(rows[i], read[i], args[i], add_to_sums);
  } else {
    std::vector<MaskGradLayer> layers;
    for (size_t i = 0; i < rows.size(); ++i) layers.push_back(make_layer(op, rows, i, read[i], args[i]));
    PK_LAUNCH(op, launch_mask_grad, element_of(rows.type()), layers.data(), layers.size(), add_to_sums,
              device::current_stream());
  }
  rows.written();
  args.written();
}

using TensorVectors = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;

TensorVectors norms_of_doubles(const RowTensors& rows, const std::vector<RowMask>& masks, bool per_kernel) {
  TensorVectors sums;
  for (size_t i = 0; i < rows.size(); ++i) {
    const at::Tensor live = masks[i] ? at::where(masks[i].live(rows[i]), rows[i], 0) : rows[i];
    const at::Tensor flat = live.unsqueeze(-1).flatten(per_kernel ? 2 : 1);
    std::get<0>(sums).push_back(flat.abs().sum(-1));
    std::get<1>(sums).push_back(flat.square().sum(-1));
  }
  return sums;
}

TensorVectors filter_norms(at::TensorList weights, const OptionalTensors& masks, bool per_kernel) {
  constexpr const char* op = "filter_norms";
  TensorVectors sums;
  if (weights.empty()) return sums;
  const at::DeviceGuard guard(weights[0].device());
  const RowTensors rows(op, "weights", weights);
  for (size_t i = 0; i < rows.size(); ++i)
    for (auto* list : {&std::get<0>(sums), &std::get<1>(sums)}) list->push_back(empty_sums(op, rows[i], per_kernel));
  const std::vector<RowMask> read = read_masks(op, masks, rows);
  if (rows.type() == at::kDouble) return norms_of_doubles(rows, read, per_kernel);
  std::vector<NormLayer> layers;
  for (size_t i = 0; i < rows.size(); ++i)
    layers.push_back({read[i].of_rows(op, rows[i], rows.layout(i)), rows[i].const_data_ptr(),
                      floats(std::get<0>(sums)[i]), floats(std::get<1>(sums)[i])});
  const Element element = element_of(rows.type());
  if (per_kernel)
    PK_LAUNCH(op, launch_kernel_norms, element, layers.data(), layers.size(), device::current_stream());
  else
    PK_LAUNCH(op, launch_filter_norms, element, layers.data(), layers.size(), device::current_stream());
  return sums;
}

}  // namespace

PK_DEVICE_OPERATORS(m) {
  m.impl("mask_grad_", mask_grads);
  m.impl("filter_norms", filter_norms);
}

}  // namespace prunekernels
