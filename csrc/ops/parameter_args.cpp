#include "ops/parameter_args.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <map>

#include "check.h"
#include "ops/conv_args.h"

namespace prunekernels {
namespace {

void count_edit(const at::Tensor& tensor) {
  if (tensor.defined()) tensor.unsafeGetTensorImpl()->bump_version();
}

// Undefined where not asked for.
at::Tensor asked(const char* op, const char* argument, at::TensorList list, size_t i, const at::Tensor& like) {
  if (list.empty() || list[i].numel() == 0) return {};
  const at::Tensor& sums = list[i];
  PK_CHECK(sums.dim() == 1 && sums.size(0) == like.size(0) && sums.is_contiguous() &&
               sums.scalar_type() == sum_type(like) && sums.device() == like.device(),
           op, argument, c10::str(toString(sum_type(like)), " [", like.size(0), "], contiguous"), sums.dtype(), " ",
           sums.sizes(), " on ", sums.device());
  return sums;
}

}  // namespace

std::optional<RowLayout> row_layout(const at::Tensor& parameter) {
  const int64_t rows = parameter.dim() ? parameter.size(0) : 1;
  const int64_t channels = parameter.dim() > 1 ? parameter.size(1) : 1;
  const int64_t taps = parameter.numel() ? parameter.numel() / (rows * channels) : 0;
  if (parameter.is_contiguous()) return RowLayout{rows, channels, taps, taps == 1};
  if (parameter.dim() == 4 && parameter.is_contiguous(at::MemoryFormat::ChannelsLast))
    return RowLayout{rows, channels, taps, true};
  return std::nullopt;
}

bool masks_rows(const char* op, const MaskTable& table, const at::Tensor& parameter) {
  const int64_t filters = table[kFilters], channels = table.channels_per_group();
  const bool is_vector = parameter.dim() == 1;
  PK_CHECK(parameter.dim() >= 1 && parameter.size(0) == filters && (is_vector || parameter.size(1) == channels), op,
           "masks", "a table for a parameter " + c10::str(parameter.sizes()),
           "one of " + std::to_string(filters) + " filters of " + std::to_string(channels) + " channels");
  return is_vector ? table[kLiveFilters] != filters : !table.nothing_dead();
}

at::ScalarType sum_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_length(const char* op, const char* argument, size_t length, size_t count, bool may_be_empty) {
  PK_CHECK(length == count || (may_be_empty && length == 0), op, argument, c10::str(count, " tensors"), length);
}

RowTensors::RowTensors(const char* op, const char* argument, at::TensorList tensors) {
  for (const at::Tensor& tensor : tensors) {
    check_dtype(op, argument, tensor, tensors[0]);
    PK_CHECK(tensor.dim() >= 1, op, argument, "tensors of at least one dimension", tensor.sizes());
    const bool serves = row_layout(tensor).has_value();
    tensors_.push_back(serves ? tensor : tensor.contiguous());
    if (!serves) copies_.emplace_back(tensor, tensors_.back());
    layouts_.push_back(*row_layout(tensors_.back()));
  }
}

at::Tensor RowTensors::beside(const char* op, const char* argument, const at::Tensor& tensor, size_t i) const {
  PK_CHECK(tensor.sizes() == tensors_[i].sizes(), op, argument, tensors_[i].sizes(), tensor.sizes());
  const std::optional<RowLayout> layout = row_layout(tensor);
  const bool serves = layout && (layout->channels_last == layouts_[i].channels_last || layouts_[i].taps == 1);
  return serves ? tensor : at::empty_like(tensors_[i], tensor.options()).copy_(tensor);
}

void RowTensors::written() const {
  for (const at::Tensor& tensor : tensors_) count_edit(tensor);
  for (const auto& [tensor, copied] : copies_) tensor.copy_(copied);
}

MaskGradArgs::MaskGradArgs(const char* op, const RowTensors& rows, const MaskGradLists& lists) : tensors_(rows.size()) {
  check_length(op, "abs_sums", lists.abs_sums.size(), rows.size());
  check_length(op, "square_sums", lists.square_sums.size(), rows.size());
  check_length(op, "product_sums", lists.product_sums.size(), rows.size());
  check_length(op, "grad_scales", lists.scales.size(), rows.size());
  check_length(op, "accumulated", lists.accumulated.size(), rows.size());
  check_length(op, "weights", lists.weights.size(), rows.size(), lists.product_sums.empty());
  for (size_t i = 0; i < rows.size(); ++i) {
    const at::Tensor& grad = rows[i];
    MaskGradTensors& tensors = tensors_[i];
    tensors.abs_sum = asked(op, "abs_sums", lists.abs_sums, i, grad);
    tensors.square_sum = asked(op, "square_sums", lists.square_sums, i, grad);
    tensors.product_sum = asked(op, "product_sums", lists.product_sums, i, grad);
    if (!lists.scales.empty() && lists.scales.get(i)) {
      check_scale(op, lists.scales.get(i), grad.size(0), grad.device());
      tensors.scale = lists.scales.get(i)->contiguous();
    }
    if (tensors.product_sum.defined()) {
      check_dtype(op, "weights", lists.weights[i], grad);
      tensors.weight = rows.beside(op, "weights", lists.weights[i], i);
    }
    if (lists.accumulated.empty() || (lists.accumulated[i].numel() == 0 && grad.numel() != 0)) continue;
    const at::Tensor& accumulated = lists.accumulated[i];
    PK_CHECK(accumulated.scalar_type() == sum_type(grad), op, "accumulated", toString(sum_type(grad)),
             accumulated.dtype());
    PK_CHECK(accumulated.device() == grad.device(), op, "accumulated", grad.device(), accumulated.device());
    tensors.accumulated = rows.beside(op, "accumulated", accumulated, i);
    accumulated_.emplace_back(accumulated, tensors.accumulated);
  }
}

void MaskGradArgs::written() const {
  for (const MaskGradTensors& tensors : tensors_)
    for (const auto* sums : {&tensors.abs_sum, &tensors.square_sum, &tensors.product_sum}) count_edit(*sums);
  for (const auto& [accumulated, laid_out] : accumulated_) {
    count_edit(accumulated);
    if (!laid_out.is_same(accumulated)) accumulated.copy_(laid_out);
  }
}

at::Tensor empty_sums(const char* op, const at::Tensor& weight, bool per_kernel) {
  PK_CHECK(!per_kernel || weight.dim() >= 2, op, "weights", "two or more dimensions for norms of kernels",
           weight.sizes());
  return at::empty(weight.sizes().slice(0, per_kernel ? 2 : 1), weight.options().dtype(sum_type(weight)));
}

void check_clusters(const char* op, const at::Tensor& clusters, const at::Tensor& grad) {
  PK_CHECK(clusters.device().is_cpu() && clusters.scalar_type() == at::kInt && clusters.dim() == 1 &&
               clusters.size(0) == grad.size(0),
           op, "clusters", c10::str("int32 [", grad.size(0), "] on the CPU"), clusters.dtype(), " ", clusters.sizes(),
           " on ", clusters.device());
}

std::vector<std::vector<int32_t>> members_of(const int32_t* clusters, int64_t rows) {
  std::map<int32_t, std::vector<int32_t>> by_cluster;
  for (int64_t k = 0; k < rows; ++k)
    if (clusters[k] >= 0) by_cluster[clusters[k]].push_back(static_cast<int32_t>(k));
  std::vector<std::vector<int32_t>> members;
  for (auto& [_, found] : by_cluster)
    if (found.size() > 1) members.push_back(std::move(found));
  return members;
}

}  // namespace prunekernels
