// Centripetal averaging: the gradient of each row of a cluster becomes the mean of the cluster's gradients, plus, where
// there are weights, a pull of the row's weight towards the cluster's mean weight.
#pragma once

#include <cstdint>

namespace prunekernels {

// grad[k] = mean over members m of grad[m] + strength * (weight[k] - mean over m of weight[m]), for each member k of
// one cluster. A null weight leaves out the second term. Means are formed in float (of doubles: in double), member by
// member.
template <typename T>
void cluster_mean(T* grad,                 // [rows, elements]
                  const T* weight,         // [rows, elements], or null
                  const int32_t* members,  // [count]
                  int64_t count, int64_t elements, double strength);

}  // namespace prunekernels
