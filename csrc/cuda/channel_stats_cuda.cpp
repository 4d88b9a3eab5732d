// channel_mean and cluster_mean_ on the device. Doubles, which the kernels do not know, go through torch.
#include <ATen/DeviceGuard.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "check.h"
#include "cuda/conv_call.h"
#include "cuda/host_cache.h"
#include "cuda/kernels/channel_stats.h"
#include "cuda/kernels/cluster_mean.h"
#include "ops/parameter_args.h"

namespace prunekernels {
namespace {

at::Tensor mean_of_channels(const at::Tensor& x, bool relu) {
  constexpr const char* op = "channel_mean";
  const at::DeviceGuard guard(x.device());
  check_dtype(op, "xs", x, x);
  PK_CHECK(x.dim() >= 2, op, "xs", "tensors [N, C, ...]", x.sizes());
  const int64_t N = x.size(0), C = x.size(1), pixels = x.numel() ? x.numel() / (N * C) : 0;
  const at::TensorOptions options = x.options().dtype(at::kFloat);
  if (x.scalar_type() == at::kDouble && x.numel()) {
    const at::Tensor rows = x.transpose(0, 1).flatten(1);
    return (relu ? rows.relu() : rows).mean(1).to(at::kFloat);
  }
  const bool last = pixels == 1 || (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast));
  const at::Tensor dense = last && pixels != 1 ? x : x.contiguous();
  const ChannelStats problem{N, C, pixels, element_of(x.scalar_type()), last, relu};
  const at::Tensor mean = at::empty({C}, options), workspace = at::empty({channel_stats_workspace(problem)}, options);
  PK_LAUNCH(op, launch_channel_stats, problem, dense.const_data_ptr(), mean.mutable_data_ptr<float>(),
            workspace.mutable_data_ptr<float>(), device::current_stream());
  return mean;
}

std::vector<at::Tensor> channel_mean(at::TensorList xs, bool relu) {
  std::vector<at::Tensor> means;
  for (const at::Tensor& x : xs) means.push_back(mean_of_channels(x, relu));
  return means;
}

// ---- cluster_mean_

// The rows of clusters with more than one, on a device.
class Clusters : public device::DeviceBuffers {
 public:
  Clusters(const std::vector<int32_t>& ids, at::Device device) : first_{0} {
    std::vector<int32_t> members;
    for (const auto& cluster : members_of(ids.data(), static_cast<int64_t>(ids.size()))) {
      members.insert(members.end(), cluster.begin(), cluster.end());
      first_.push_back(static_cast<int32_t>(members.size()));
    }
    std::vector<int32_t> words = first_;
    words.insert(words.end(), members.begin(), members.end());
    words_ = keep(device::upload(words, device));
  }

  int64_t count() const { return static_cast<int64_t>(first_.size()) - 1; }
  const int32_t* first() const { return words_.const_data_ptr<int32_t>(); }  // device [count + 1]
  const int32_t* members() const { return first() + first_.size(); }         // device [first[count]]
  at::Tensor members_of_cluster(int64_t c) const {
    return words_.narrow(0, static_cast<int64_t>(first_.size()) + first_[c], first_[c + 1] - first_[c]);
  }

 private:
  std::vector<int32_t> first_;
  at::Tensor words_;
};

std::shared_ptr<const Clusters> read_clusters(const char* op, const at::Tensor& ids, const at::Tensor& grad) {
  check_clusters(op, ids, grad);
  // Of ids on the CPU there may be one on each device; no other user of host_cache::find gives numbers as low.
  const int64_t parameter = std::numeric_limits<int64_t>::min() + 1 + grad.device().index();
  return std::static_pointer_cast<const Clusters>(host_cache::find(
      op, "clusters", ids, parameter,
      [&](const std::vector<int32_t>& words) { return std::make_shared<const Clusters>(words, grad.device()); }));
}

// weight: undefined without a pull
void average_doubles(const at::Tensor& grad, const at::Tensor& weight, const Clusters& clusters, double strength) {
  for (int64_t c = 0; c < clusters.count(); ++c) {
    const at::Tensor members = clusters.members_of_cluster(c).to(at::kLong);
    const at::Tensor of_members = grad.index_select(0, members);
    at::Tensor mean = of_members.mean(0, true);
    if (weight.defined()) {
      const at::Tensor w = weight.index_select(0, members);
      mean = w.sub(w.mean(0, true)).mul_(strength).add_(mean);
    }
    grad.index_copy_(0, members, mean.expand_as(of_members));
  }
}

void cluster_mean(at::TensorList grads, at::TensorList ids, at::TensorList weights, double strength) {
  constexpr const char* op = "cluster_mean_";
  check_length(op, "clusters", ids.size(), grads.size(), false);
  check_length(op, "weights", weights.size(), grads.size());
  if (grads.empty()) return;
  const at::DeviceGuard guard(grads[0].device());
  const RowTensors rows(op, "grads", grads);
  std::vector<std::shared_ptr<const Clusters>> clusters;
  std::vector<at::Tensor> beside(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    clusters.push_back(read_clusters(op, ids[i], rows[i]));
    if (weights.empty()) continue;
    check_dtype(op, "weights", weights[i], rows[i]);
    beside[i] = rows.beside(op, "weights", weights[i], i);
  }
  std::vector<ClusterLayer> layers;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows.type() == at::kDouble) {
      average_doubles(rows[i], beside[i], *clusters[i], strength);
      continue;
    }
    layers.push_back({rows[i].mutable_data_ptr(), beside[i].defined() ? beside[i].const_data_ptr() : nullptr,
                      clusters[i]->first(), clusters[i]->members(), clusters[i]->count(),
                      rows.layout(i).row_elements()});
  }
  if (!layers.empty())
    PK_LAUNCH(op, launch_cluster_mean, element_of(rows.type()), layers.data(), layers.size(),
              static_cast<float>(strength), device::current_stream());
  rows.written();
}

}  // namespace

PK_DEVICE_OPERATORS(m) {
  m.impl("channel_mean", channel_mean);
  m.impl("cluster_mean_", cluster_mean);
}

}  // namespace prunekernels
