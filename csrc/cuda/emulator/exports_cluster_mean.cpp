#include "cuda/kernels/cluster_mean.h"

using namespace prunekernels;

extern "C" {

int pk_cluster_mean(int element, const void* layers, int64_t count, float strength) {
  return launch_cluster_mean(static_cast<Element>(element), static_cast<const ClusterLayer*>(layers), count, strength,
                             nullptr);
}
}
