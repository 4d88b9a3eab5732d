// mask_grad_ and filter_norms on CPU.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/kernels/mask_grad.h"
#include "cpu/rows.h"
#include "cpu/tensor_access.h"

namespace prunekernels {
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

template <typename T>
using SumOf = typename Arithmetic<T>::type;

using RowMasks = std::vector<std::optional<MaskTable>>;

RowMasks read_masks(const char* op, const OptionalTensors& masks, const Rows& rows) {
  check_length(op, "masks", masks.size(), rows.size());
  RowMasks read(rows.size());
  for (size_t i = 0; i < masks.size(); ++i) read[i] = read_row_mask(op, masks.get(i), rows[i]);
  return read;
}

bool row_is_dead(const std::optional<MaskTable>& mask, const at::Tensor& tensor, int64_t row) {
  if (!mask) return false;
  return tensor.dim() == 1 ? mask->out_slot()[row] == kDead : mask->out_slot()[row] < 0;
}

// A list's tensors where somebody asks for them: their elements, else null.
template <typename A>
std::vector<A*> asked(const char* op, const char* argument, at::TensorList list, const Rows& rows, bool add_to_sums) {
  check_length(op, argument, list.size(), rows.size());
  std::vector<A*> pointers(rows.size(), nullptr);
  for (size_t i = 0; i < list.size(); ++i) {
    const at::Tensor& sums = list[i];
    if (sums.numel() == 0) continue;
    PK_CHECK(sums.dim() == 1 && sums.size(0) == rows[i].size(0) && sums.is_contiguous() &&
                 sums.scalar_type() == sum_type(rows[i]) && sums.device().is_cpu(),
             op, argument, c10::str(toString(sum_type(rows[i])), " [", rows[i].size(0), "], contiguous"), sums.dtype(),
             " ", sums.sizes());
    sums.unsafeGetTensorImpl()->bump_version();
    if (rows[i].numel() == 0 && !add_to_sums) sums.zero_();  // no row is passed over
    pointers[i] = static_cast<A*>(sums.mutable_data_ptr());
  }
  return pointers;
}

struct MaskGradLists {
  const OptionalTensors& masks;
  const OptionalTensors& scales;
  at::TensorList weights, accumulated, abs_sums, square_sums, product_sums;
};

template <typename T>
void mask_grad_of(const Rows& rows, const MaskGradLists& lists, bool add_to_sums) {
  using A = SumOf<T>;
  constexpr const char* op = "mask_grad_";
  const RowMasks masks = read_masks(op, lists.masks, rows);
  const auto abs = asked<A>(op, "abs_sums", lists.abs_sums, rows, add_to_sums);
  const auto square = asked<A>(op, "square_sums", lists.square_sums, rows, add_to_sums);
  const auto product = asked<A>(op, "product_sums", lists.product_sums, rows, add_to_sums);
  check_length(op, "grad_scales", lists.scales.size(), rows.size());
  check_length(op, "accumulated", lists.accumulated.size(), rows.size());
  check_length(op, "weights", lists.weights.size(), rows.size(), lists.product_sums.empty());
  std::vector<at::Tensor> scales(rows.size()), weights(rows.size()), accumulated(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!lists.scales.empty() && lists.scales.get(i)) {
      check_scale(op, lists.scales.get(i), rows[i].size(0));
      scales[i] = lists.scales.get(i)->contiguous();
    }
    if (product[i]) {
      check_dtype(op, "weights", lists.weights[i], rows[i]);
      weights[i] = rows.beside(op, "weights", lists.weights[i], i);
    }
    if (lists.accumulated.empty() || (lists.accumulated[i].numel() == 0 && rows[i].numel() != 0)) continue;
    PK_CHECK(lists.accumulated[i].scalar_type() == sum_type(rows[i]), op, "accumulated", toString(sum_type(rows[i])),
             lists.accumulated[i].dtype());
    accumulated[i] = rows.beside(op, "accumulated", lists.accumulated[i], i);
  }
  auto* const kernel = [] {
    if constexpr (std::is_same_v<T, float>)
      return mask_grad_kernels().mask_grad;
    else
      return mask_grad<T>;
  }();
  rows.each([&](OfThread& thread, size_t i, int64_t k) {
    const RowLayout& layout = rows.layout(i);
    const int64_t elements = rows[i].dim() == 1 ? 1 : layout.row_elements(), offset = k * elements;
    const bool dead = row_is_dead(masks[i], rows[i], k);
    MaskGradRow<T> row{};
    row.grad = prunekernels::elements<T>(rows[i]) + offset;
    row.elements = elements;
    row.scale = dead ? A{} : scales[i].defined() ? static_cast<A>(scales[i].const_data_ptr<float>()[k]) : A{1};
    if (weights[i].defined()) row.weight = const_elements<T>(weights[i]) + offset;
    if (accumulated[i].defined()) row.accumulated = static_cast<A*>(accumulated[i].mutable_data_ptr()) + offset;
    if (masks[i] && !dead && rows[i].dim() > 1) row.live = thread.bits.of_row(*masks[i], layout, k);
    if (abs[i]) row.abs_sum = abs[i] + k;
    if (square[i]) row.square_sum = square[i] + k;
    if (product[i]) row.product_sum = product[i] + k;
    row.add_to_sums = add_to_sums;
    kernel(row);
  });
  rows.written();
  for (size_t i = 0; i < lists.accumulated.size(); ++i) {
    if (!accumulated[i].defined()) continue;
    lists.accumulated[i].unsafeGetTensorImpl()->bump_version();
    if (!accumulated[i].is_same(lists.accumulated[i])) lists.accumulated[i].copy_(accumulated[i]);
  }
}

void mask_grads(at::TensorList grads, const OptionalTensors& masks, const OptionalTensors& scales,
                at::TensorList weights, at::TensorList accumulated, at::TensorList abs_sums, at::TensorList square_sums,
                at::TensorList product_sums, bool add_to_sums) {
  if (grads.empty()) return;
  const Rows rows("mask_grad_", "grads", grads);
  const MaskGradLists lists{masks, scales, weights, accumulated, abs_sums, square_sums, product_sums};
  with_element(rows.type(), [&](auto element) { mask_grad_of<decltype(element)>(rows, lists, add_to_sums); });
}

using TensorVectors = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;

template <typename T>
void norms_of(const Rows& rows, const RowMasks& masks, bool per_kernel, const TensorVectors& sums) {
  using A = SumOf<T>;
  const auto sums_of = [](const at::Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
  auto* const kernel = [] {
    if constexpr (std::is_same_v<T, float>)
      return mask_grad_kernels().norm;
    else
      return row_norm<T>;
  }();
  rows.each([&](OfThread& thread, size_t i, int64_t k) {
    const RowLayout& layout = rows.layout(i);
    const T* weight = const_elements<T>(rows[i]) + k * layout.row_elements();
    const int64_t width = per_kernel ? layout.channels : 1;
    A* abs = sums_of(std::get<0>(sums)[i]) + k * width;
    A* square = sums_of(std::get<1>(sums)[i]) + k * width;
    if (row_is_dead(masks[i], rows[i], k)) {
      std::fill(abs, abs + width, A{});
      std::fill(square, square + width, A{});
    } else if (per_kernel) {
      kernel_norms<T>(weight, masks[i] ? masks[i]->pairs(k) : nullptr, layout.channels, layout.taps,
                      layout.channels_last, abs, square);
    } else {
      const uint32_t* live = masks[i] && rows[i].dim() > 1 ? thread.bits.of_row(*masks[i], layout, k) : nullptr;
      kernel(NormRow<T>{weight, live, layout.row_elements(), abs, square});
    }
  });
}

TensorVectors filter_norms(at::TensorList weights, const OptionalTensors& masks, bool per_kernel) {
  constexpr const char* op = "filter_norms";
  TensorVectors sums;
  if (weights.empty()) return sums;
  const Rows rows(op, "weights", weights);
  for (size_t i = 0; i < rows.size(); ++i) {
    PK_CHECK(!per_kernel || rows[i].dim() >= 2, op, "weights", "two or more dimensions for norms of kernels",
             rows[i].sizes());
    const auto size = per_kernel ? rows[i].sizes().slice(0, 2) : rows[i].sizes().slice(0, 1);
    for (auto* list : {&std::get<0>(sums), &std::get<1>(sums)})
      list->push_back(at::zeros(size, rows[i].options().dtype(sum_type(rows[i]))));
  }
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
