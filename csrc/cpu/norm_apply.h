// The last pass of a batch norm over an activation, whose channels' scales are known.
#pragma once

#include <cstring>

#include "cpu/norm_passes.h"

namespace prunekernels {

// What a norm does to each channel of x.
struct Scales {
  std::vector<float> mean, scale, bias;
  std::vector<uint32_t> keep;  // all bits or none: the result is 0, whatever x is
};

template <typename T>
void apply_by_planes(const NormShape& s, const T* x, T* y, const Scales& by, const NormEnd<T>& end) {
  const NormKernels<T>& kernels = norm_kernels<T>();
  const int64_t grain = std::max<int64_t>(1, kNormGrain / s.pixels);
  at::parallel_for(0, s.images * s.channels, grain, [&](int64_t begin, int64_t stop) {
    const FlushDenormals flush;
    for (int64_t plane = begin; plane < stop; ++plane) {
      const int64_t c = plane % s.channels, at = plane * s.pixels;
      if (!by.keep[c]) {
        std::memset(y + at, 0, s.pixels * sizeof(T));
        continue;
      }
      kernels.apply_segment(x + at, y + at, s.pixels, by.mean[c], by.scale[c], by.bias[c],
                            {end.add ? end.add + at : nullptr, end.relu});
    }
  });
}

template <typename T>
void apply_by_runs(const NormShape& s, const T* x, T* y, const Scales& by, const NormEnd<T>& end) {
  const NormKernels<T>& kernels = norm_kernels<T>();
  const Runs runs(s);
  const AtPositions<float> mean(runs, by.mean), scale(runs, by.scale), bias(runs, by.bias);
  const AtPositions<uint32_t> keep(runs, by.keep);
  in_runs(runs, [&](int64_t offset, const NormRows& rows, int64_t at) {
    AtPositions<float>::Block block[3];
    AtPositions<uint32_t>::Block kept;
    const NormScales here{mean.in(block[0], at, rows.length), scale.in(block[1], at, rows.length),
                          bias.in(block[2], at, rows.length), keep.in(kept, at, rows.length)};
    kernels.apply_rows(x + offset, y + offset, rows, here, {end.add ? end.add + offset : nullptr, end.relu});
  });
}

// end: only where all channels are kept.
template <typename T>
void apply(const NormShape& s, const T* x, T* y, const Scales& by, const NormEnd<T>& end) {
  (s.applies_by_planes() ? apply_by_planes<T> : apply_by_runs<T>)(s, x, y, by, end);
}

}  // namespace prunekernels
