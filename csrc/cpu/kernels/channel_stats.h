// means[c] = mean over n and p of x(n, c, p), or of its relu; 0 if there are no pixels. Sums are formed in double, each
// channel's by one thread. NaN stays NaN.
#pragma once

#include "core/scalar_types.h"
#include "cpu/kernels/channels.h"

namespace prunekernels {

template <typename T>
void channel_means(const ChannelView<const T>& x, bool relu, float* means, int64_t begin, int64_t end);

}  // namespace prunekernels
