// Centripetal averaging: every row of a cluster gets the mean of the cluster's rows, and where asked a pull of its
// weight towards the cluster's mean weight.
#pragma once

#include <cstdint>

namespace prunekernels {

// grad[k] = mean over members m of grad[m], + strength (weight[k] - mean over m of weight[m]) with a weight; for the
// members k of one cluster. Means are formed in float (of doubles: in double), member by member.
template <typename T>
void cluster_mean(T* grad,                 // [rows, elements]
                  const T* weight,         // [rows, elements], or null
                  const int32_t* members,  // [count]
                  int64_t count, int64_t elements, double strength);

}  // namespace prunekernels
