// means[c] = average of x[n, c, p], after relu where asked, over n and p; 0 where there are none. Sums are formed in
// double, a channel by one thread. NaN stays NaN.
#pragma once

#include "core/scalar_types.h"
#include "cpu/kernels/channels.h"

namespace prunekernels {

template <typename T>
void channel_means(const ChannelView<const T>& x, bool relu, float* means, int64_t begin, int64_t end);

}  // namespace prunekernels
