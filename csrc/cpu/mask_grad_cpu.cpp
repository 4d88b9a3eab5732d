// mask_grad_ and filter_norms on CPU.
#include <torch/library.h>

#include "cpu/kernels/mask_grad.h"
#include "cpu/parallel.h"
#include "cpu/tensor_access.h"

namespace prunekernels {
namespace {

template <typename T>
using SumOf = typename Arithmetic<T>::type;

using RowMasks = std::vector<std::optional<MaskTable>>;

RowMasks read_masks(const char* op, const OptionalTensors& masks, const RowTensors& rows) {
  check_length(op, "masks", masks.size(), rows.size());
  RowMasks read(rows.size());
  for (size_t i = 0; i < masks.size(); ++i) read[i] = read_row_mask(op, masks.get(i), rows[i]);
  return read;
}

bool row_is_dead(const std::optional<MaskTable>& mask, const at::Tensor& tensor, int64_t row) {
  if (!mask) return false;
  return tensor.dim() == 1 ? mask->out_slot()[row] == kDead : mask->out_slot()[row] < 0;
}

template <typename A>
A* sums_of(const at::Tensor& t) {
  return static_cast<A*>(t.mutable_data_ptr());
}

template <typename T>
void mask_grad_of(const RowTensors& rows, const RowMasks& masks, const MaskGradArgs& args, bool add_to_sums) {
  using A = SumOf<T>;
  auto* const kernel = [] {
    if constexpr (std::is_same_v<T, float>)
      return mask_grad_kernels().mask_grad;
    else
      return mask_grad<T>;
  }();
  each_row(rows, [&](ThreadState& state, size_t i, int64_t k) {
    const RowLayout& layout = rows.layout(i);
    const MaskGradTensors& tensors = args[i];
    const int64_t elements = layout.row_elements(), offset = k * elements;
    const bool dead = row_is_dead(masks[i], rows[i], k);
    MaskGradRow<T> row{};
    row.grad = prunekernels::elements<T>(rows[i]) + offset;
    row.elements = elements;
    row.scale = dead ? A{} : tensors.scale.defined() ? static_cast<A>(tensors.scale.const_data_ptr<float>()[k]) : A{1};
    if (tensors.weight.defined()) row.weight = const_elements<T>(tensors.weight) + offset;
    if (tensors.accumulated.defined()) row.accumulated = sums_of<A>(tensors.accumulated) + offset;
    if (masks[i] && !dead && rows[i].dim() > 1) row.live = state.bits.of_row(*masks[i], layout, k);
    if (tensors.abs_sum.defined()) row.abs_sum = sums_of<A>(tensors.abs_sum) + k;
    if (tensors.square_sum.defined()) row.square_sum = sums_of<A>(tensors.square_sum) + k;
    if (tensors.product_sum.defined()) row.product_sum = sums_of<A>(tensors.product_sum) + k;
    row.add_to_sums = add_to_sums;
    kernel(row);
  });
}

void mask_grads(at::TensorList grads, const OptionalTensors& masks, const OptionalTensors& scales,
                at::TensorList weights, at::TensorList accumulated, at::TensorList abs_sums, at::TensorList square_sums,
                at::TensorList product_sums, bool add_to_sums) {
  constexpr const char* op = "mask_grad_";
  if (grads.empty()) return;
  const RowTensors rows(op, "grads", grads);
  const RowMasks masked = read_masks(op, masks, rows);
  const MaskGradArgs args(op, rows, {scales, weights, accumulated, abs_sums, square_sums, product_sums});
  for (size_t i = 0; i < rows.size(); ++i)  // empty tensors have no row that a kernel visits
    for (const at::Tensor& sums : {args[i].abs_sum, args[i].square_sum, args[i].product_sum})
      if (rows[i].numel() == 0 && sums.defined() && !add_to_sums) sums.zero_();
  with_element(rows.type(), [&](auto element) { mask_grad_of<decltype(element)>(rows, masked, args, add_to_sums); });
  rows.written();
  args.written();
}

using TensorVectors = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;

template <typename T>
void norms_of(const RowTensors& rows, const RowMasks& masks, bool per_kernel, const TensorVectors& sums) {
  using A = SumOf<T>;
  auto* const kernel = [] {
    if constexpr (std::is_same_v<T, float>)
      return mask_grad_kernels().norm;
    else
      return row_norm<T>;
  }();
  each_row(rows, [&](ThreadState& state, size_t i, int64_t k) {
    const RowLayout& layout = rows.layout(i);
    const T* weight = const_elements<T>(rows[i]) + k * layout.row_elements();
    const int64_t width = per_kernel ? layout.channels : 1;
    A* abs = sums_of<A>(std::get<0>(sums)[i]) + k * width;
    A* square = sums_of<A>(std::get<1>(sums)[i]) + k * width;
    if (row_is_dead(masks[i], rows[i], k)) {
      std::fill(abs, abs + width, A{});
      std::fill(square, square + width, A{});
    } else if (per_kernel) {
      kernel_norms<T>(weight, masks[i] ? masks[i]->pairs(k) : nullptr, layout.channels, layout.taps,
                      layout.channels_last, abs, square);
    } else {
      const uint32_t* live = masks[i] && rows[i].dim() > 1 ? state.bits.of_row(*masks[i], layout, k) : nullptr;
      kernel(NormRow<T>{weight, live, layout.row_elements(), abs, square});
    }
  });
}

TensorVectors filter_norms(at::TensorList weights, const OptionalTensors& masks, bool per_kernel) {
  constexpr const char* op = "filter_norms";
  TensorVectors sums;
  if (weights.empty()) return sums;
  const RowTensors rows(op, "weights", weights);
  for (size_t i = 0; i < rows.size(); ++i)
    for (auto* list : {&std::get<0>(sums), &std::get<1>(sums)})
      list->push_back(empty_sums(op, rows[i], per_kernel).zero_());
  const RowMasks masked = read_masks(op, masks, rows);
  with_element(rows.type(), [&](auto element) { norms_of<decltype(element)>(rows, masked, per_kernel, sums); });
  return sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("mask_grad_", mask_grads);
  m.impl("filter_norms", filter_norms);
}

}  // namespace prunekernels
