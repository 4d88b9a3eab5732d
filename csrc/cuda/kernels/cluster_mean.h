// Centripetal averaging for many layers in one launch: the gradient of each row of a cluster becomes the mean of the
// cluster's gradients, plus, where there are weights, a pull of the row's weight towards the cluster's mean weight.
// Means are formed in fp32, in the order of the members.
#pragma once

#include <cstdint>

#include "cuda/kernels/stream.h"

namespace prunekernels {

// grad[k] = mean over members m of grad[m] + strength * (weight[k] - mean over m of weight[m]), for each member k of
// each cluster. A null weight leaves out the second term. Rows of no cluster are neither read nor written.
struct ClusterLayer {
  void* grad;              // [rows, elements]
  const void* weight;      // [rows, elements], of the gradient's type; or null
  const int32_t* first;    // [clusters + 1]; where the members of each cluster begin
  const int32_t* members;  // [first[clusters]]; rows, each in one cluster
  int64_t clusters, elements;
};

cudaError_t launch_cluster_mean(Element element, const ClusterLayer* layers, int64_t count, float strength,
                                cudaStream_t stream);

}  // namespace prunekernels
