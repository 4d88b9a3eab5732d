// channel_mean and cluster_mean_ on CPU.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "check.h"
#include "cpu/kernels/channel_stats.h"
#include "cpu/kernels/cluster_mean.h"
#include "cpu/parallel.h"
#include "cpu/tensor_access.h"
#include "ops/conv_args.h"

namespace prunekernels {
namespace {

at::Tensor mean_of_channels(const at::Tensor& x, bool relu) {
  constexpr const char* op = "channel_mean";
  check_dtype(op, "xs", x, x);
  PK_CHECK(x.dim() >= 2, op, "xs", "tensors [N, C, ...]", x.sizes());
  const int64_t N = x.size(0), C = x.size(1), pixels = x.numel() ? x.numel() / (N * C) : 0;
  const at::Tensor mean = at::zeros({C}, x.options().dtype(at::kFloat));
  const bool last = x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor dense = last ? x : x.contiguous();
  with_element(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const ChannelView<const T> view{const_elements<T>(dense), N, pixels, pixels * C, last ? 1 : pixels, last ? C : 1};
    const int64_t grain = kGrain / std::max<int64_t>(1, N * pixels) + 1;
    at::parallel_for(0, C, (grain + 15) / 16 * 16, [&](int64_t begin, int64_t end) {
      channel_means<T>(view, relu, mean.mutable_data_ptr<float>(), begin, end);
    });
  });
  return mean;
}

std::vector<at::Tensor> channel_mean(at::TensorList xs, bool relu) {
  std::vector<at::Tensor> means;
  for (const at::Tensor& x : xs) means.push_back(mean_of_channels(x, relu));
  return means;
}

struct ClusterWork {
  size_t layer;
  std::vector<int32_t> members;
};

template <typename T>
void cluster_means(const RowTensors& rows, const std::vector<ClusterWork>& works,
                   const std::vector<at::Tensor>& weights, double strength) {
  std::vector<int64_t> costs;
  const auto elements_of = [&](size_t i) { return rows.layout(i).row_elements(); };
  for (const ClusterWork& work : works) costs.push_back(work.members.size() * elements_of(work.layer));
  share_among_threads(costs, [&](ThreadState&, size_t at, int64_t, int64_t last) {
    if (last != costs[at]) return;  // a cluster belongs to the thread that has its end
    const auto& [i, members] = works[at];
    const T* weight = weights.empty() ? nullptr : const_elements<T>(weights[i]);
    cluster_mean<T>(elements<T>(rows[i]), weight, members.data(), members.size(), elements_of(i), strength);
  });
}

void cluster_mean_lists(at::TensorList grads, at::TensorList clusters, at::TensorList weights, double strength) {
  constexpr const char* op = "cluster_mean_";
  check_length(op, "clusters", clusters.size(), grads.size(), false);
  check_length(op, "weights", weights.size(), grads.size());
  if (grads.empty()) return;
  const RowTensors rows(op, "grads", grads);
  std::vector<ClusterWork> works;
  std::vector<at::Tensor> beside;
  for (size_t i = 0; i < rows.size(); ++i) {
    check_clusters(op, clusters[i], rows[i]);
    const at::Tensor ids = clusters[i].contiguous();
    for (auto& members : members_of(ids.const_data_ptr<int32_t>(), ids.numel()))
      works.push_back({i, std::move(members)});
    if (weights.empty()) continue;
    check_dtype(op, "weights", weights[i], rows[i]);
    beside.push_back(rows.beside(op, "weights", weights[i], i));
  }
  with_element(rows.type(), [&](auto element) { cluster_means<decltype(element)>(rows, works, beside, strength); });
  rows.written();
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("channel_mean", channel_mean);
  m.impl("cluster_mean_", cluster_mean_lists);
}

}  // namespace prunekernels
