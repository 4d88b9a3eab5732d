#include "cpu/kernels/quad_kernels.h"

#include <cstring>
#include <utility>

#include "core/scalar_types.h"
#include "cpu/kernels/isa_dispatch.h"

namespace prunekernels {

#define PK_QUADS(isa) QuadKernels quad_kernels_##isa();
#include "kernel_table.inc"

namespace {

float dot(uint32_t a, uint32_t b, float sum) {
  sum += float_from_bits(a & 0xffff0000) * float_from_bits(b & 0xffff0000);
  return sum + float_from_bits(a << 16) * float_from_bits(b << 16);
}

template <int kVectors>
void conv(const QuadTile& t) {
  for (int p = 0; p < kVectors * kQuadLanes; ++p) {
    float sum[kQuad];
    std::memcpy(sum, t.start, sizeof(sum));
    const uint32_t* w = t.weights;
    for (int64_t j = 0; j < t.pair_count; ++j)
      for (int64_t tap = 0; tap < t.tap_count; ++tap, w += kQuad)
        for (int i = 0; i < kQuad; ++i) sum[i] = dot(w[i], t.x[t.pairs[j] + t.taps[tap] + p], sum[i]);
    for (int half = 0; half < kQuad / 2; ++half)
      t.y[half * t.y_plane + p] =
          BFloat16::from(sum[2 * half]).bits | static_cast<uint32_t>(BFloat16::from(sum[2 * half + 1]).bits) << 16;
  }
}

template <int kXs>
void dots(const QuadDots& d) {
  for (int f = 0; f < kQuad; ++f)
    for (int j = 0; j < kXs; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < d.vectors * kQuadLanes; ++i) {
        uint32_t g, x;
        std::memcpy(&g, d.g[f] + 2 * i, sizeof(g));
        std::memcpy(&x, d.x[j] + 2 * i, sizeof(x));
        sum = dot(g, x, sum);
      }
      d.out[f * kXs + j] += sum;
    }
}

// Pixel i of a padded row; null: zeros.
const uint16_t* pixel_of(const PaddedRow& row, int64_t i) {
  return i < row.left || i >= row.left + row.count ? nullptr : row.pixels + (i - row.left) * row.pixel;
}

int64_t place_of(const int32_t* places, int64_t j) { return places ? places[j] : j; }

void to_pair_planes(const PaddedRow& row, int64_t pairs, const int32_t* places, uint32_t* to, int64_t plane) {
  for (int64_t i = 0; i < row.length(); ++i) {
    const uint16_t* pixel = pixel_of(row, i);
    for (int64_t j = 0; j < pairs; ++j) {
      uint32_t pair = 0;
      if (pixel) std::memcpy(&pair, pixel + 2 * j, sizeof(pair));
      if (place_of(places, j) >= 0) to[place_of(places, j) * plane + i] = pair;
    }
  }
}

void to_planes(const PaddedRow& row, int64_t channels, const int32_t* places, uint16_t* to, int64_t plane) {
  for (int64_t i = 0; i < (row.length() + 1) / 2 * 2; ++i) {
    const uint16_t* pixel = pixel_of(row, i);
    for (int64_t c = 0; c < channels; ++c)
      if (place_of(places, c) >= 0) to[place_of(places, c) * plane + i] = pixel ? pixel[c] : 0;
  }
}

void to_pixels(const uint32_t* from, int64_t plane, int64_t pairs, int64_t count, uint16_t* to, int64_t pixel) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < pairs; ++j) std::memcpy(to + i * pixel + 2 * j, from + j * plane + i, sizeof(*from));
}

template <int... kNumbers>
void fill(QuadKernels& kernels, std::integer_sequence<int, kNumbers...>) {
  ((kernels.conv[kNumbers + 1] = conv<kNumbers + 1>), ...);
  ((kernels.dots[kNumbers + 1] = dots<kNumbers + 1>), ...);
}

constexpr IsaKernels<QuadKernels> kRows[] = {
#define PK_QUADS(isa) {Isa::isa, kernels_of<Isa::isa, quad_kernels_##isa>},
#include "kernel_table.inc"
};

}  // namespace

QuadKernels quad_kernels_scalar() {
  QuadKernels kernels{};
  static_assert(kQuadVectors == kQuadOperands);
  fill(kernels, std::make_integer_sequence<int, kQuadVectors>());
  kernels.to_pair_planes = to_pair_planes, kernels.to_planes = to_planes, kernels.to_pixels = to_pixels;
  return kernels;
}

const QuadKernels& quad_kernels() { return best_allowed(kRows); }

}  // namespace prunekernels
