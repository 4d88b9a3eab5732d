#include "ops/optim_args.h"

#include <ATen/ops/empty_like.h>

#include "check.h"
#include "ops/conv_args.h"

namespace prunekernels {
namespace {

bool laid_out_alike(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

void check_one_per_weight(const char* op, const char* argument, size_t length, size_t count) {
  PK_CHECK(length == count, op, argument, c10::str(count, " tensors, one per weight"), length);
}

void check_beside(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& weight) {
  PK_CHECK(tensor.layout() == at::kStrided, op, argument, "dense tensors", tensor.layout());
  check_dtype(op, argument, tensor, weight);
  PK_CHECK(tensor.sizes() == weight.sizes(), op, argument, c10::str(weight.sizes(), " as its weight"), tensor.sizes());
}

void check_update(const char* op, const char* argument, at::TensorList updates, size_t i, const at::Tensor& weight) {
  if (updates.empty() || updates[i].numel() == 0) return;
  const at::Tensor& sums = updates[i];
  PK_CHECK(weight.dim() >= 2, op, argument, "no sums for a parameter of fewer than two dimensions", weight.sizes());
  PK_CHECK(sums.scalar_type() == at::kFloat && sums.is_contiguous() && sums.device() == weight.device() &&
               sums.dim() == 1 && sums.size(0) == weight.size(0),
           op, argument, c10::str("float32 [", weight.size(0), "], contiguous"), sums.dtype(), " ", sums.sizes(),
           " on ", sums.device());
}

void count_edit(const at::Tensor& tensor) {
  if (tensor.defined()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

void check_lists(const OptimLists& lists) {
  const size_t count = lists.weights.size();
  check_one_per_weight(lists.op, "grads", lists.grads.size(), count);
  check_one_per_weight(lists.op, "masks", lists.masks.size(), count);
  for (const auto& [name, state] : lists.states) check_one_per_weight(lists.op, name, state.size(), count);
  const std::pair<const char*, at::TensorList> updates[] = {{"abs_updates", lists.abs_updates},
                                                            {"square_updates", lists.square_updates}};
  for (const auto& [name, sums] : updates)
    if (!sums.empty()) check_one_per_weight(lists.op, name, sums.size(), count);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& weight = lists.weights[i];
    check_dtype(lists.op, "weights", weight, lists.weights[0]);
    check_beside(lists.op, "grads", lists.grads[i], weight);
    for (const auto& [name, state] : lists.states) check_beside(lists.op, name, state[i], weight);
    for (const auto& [name, sums] : updates) check_update(lists.op, name, sums, i, weight);
  }
}

std::vector<double> advance(const OptimLists& lists, at::TensorList steps) {
  check_one_per_weight(lists.op, "steps", steps.size(), lists.weights.size());
  for (const at::Tensor& step : steps)
    PK_CHECK(step.device().is_cpu() && step.numel() == 1 &&
                 (step.scalar_type() == at::kDouble || step.scalar_type() == at::kFloat),
             lists.op, "steps", "a float32 scalar on the CPU", step.dtype(), " ", step.sizes(), " on ", step.device());
  std::vector<double> counts;
  for (const at::Tensor& step : steps) {
    count_edit(step);
    const bool is_double = step.scalar_type() == at::kDouble;
    counts.push_back(is_double ? ++*step.mutable_data_ptr<double>() : ++*step.mutable_data_ptr<float>());
  }
  return counts;
}

OptimTensors OptimLayouts::take(const OptimLists& lists, size_t i, bool masked) {
  const auto asked = [&](at::TensorList sums) { return sums.empty() || sums[i].numel() == 0 ? at::Tensor{} : sums[i]; };
  OptimTensors tensors;
  tensors.abs_update = asked(lists.abs_updates);
  tensors.square_update = asked(lists.square_updates);
  tensors.by_rows = masked || tensors.abs_update.defined() || tensors.square_update.defined();
  tensors.weight = weight(lists.weights[i], tensors.by_rows);
  tensors.grad = laid_out_alike(lists.grads[i], tensors.weight) ? lists.grads[i]
                                                                : at::empty_like(tensors.weight).copy_(lists.grads[i]);
  for (size_t s = 0; s < lists.states.size(); ++s) {
    const at::Tensor& state = lists.states[s].second[i];
    tensors.state[s] = beside(tensors.weight, state);
    count_edit(state);
  }
  count_edit(lists.weights[i]);
  count_edit(tensors.abs_update);
  count_edit(tensors.square_update);
  return tensors;
}

void OptimLayouts::write_back() const {
  for (const auto& [tensor, copied] : copies_) tensor.copy_(copied);
}

at::Tensor OptimLayouts::copy(const at::Tensor& tensor, at::Tensor copied) {
  copies_.emplace_back(tensor, copied);
  return copied;
}

at::Tensor OptimLayouts::weight(const at::Tensor& weight, bool by_rows) {
  const bool serves = by_rows ? row_layout(weight).has_value() : weight.is_non_overlapping_and_dense();
  return serves ? weight : copy(weight, weight.contiguous());
}

at::Tensor OptimLayouts::beside(const at::Tensor& weight, const at::Tensor& tensor) {
  return laid_out_alike(tensor, weight) ? tensor : copy(tensor, at::empty_like(weight).copy_(tensor));
}

}  // namespace prunekernels
