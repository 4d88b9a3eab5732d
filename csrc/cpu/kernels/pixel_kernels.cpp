#include "cpu/kernels/pixel_kernels.h"

#include <cstring>
#include <utility>

#include "cpu/kernels/isa_dispatch.h"

namespace prunekernels {

#define PK_PIXELS(isa) PixelKernels pixel_kernels_##isa();
#include "kernel_table.inc"
PixelKernels pixel_kernels_amx_model();

namespace {

constexpr int kMost = 16;  // pixels or filters of a tile

float widened(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays one
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float dot(uint32_t a, uint32_t b, float sum) {
  sum += widened(a >> 16) * widened(b >> 16);
  return sum + widened(a & 0xffff) * widened(b & 0xffff);
}

template <int kPixels, int kFilters>
void conv(const PixelTile& t) {
  for (int p = 0; p < kPixels; ++p)
    for (int i = 0; i < kFilters; ++i) {
      float sum = t.start[i];
      for (int64_t tap = 0; tap < t.tap_count; ++tap)
        for (int64_t j = 0; j < t.pairs; ++j) {
          uint32_t x;
          std::memcpy(&x, t.x + t.taps[tap] + p * t.x_pixel + 2 * j, sizeof(x));
          sum = dot(t.weights[(tap * t.pairs + j) * kPixelBlock + i], x, sum);
        }
      t.y[p * t.y_pixel + i] = t.lanes >> i & 1 ? narrowed(sum) : 0;
    }
}

template <int kFilters, int kChannels>
void dots(const PixelDots& d) {
  for (int f = 0; f < kFilters; ++f)
    for (int c = 0; c < kChannels; ++c) {
      float sum = d.out[f * d.out_filter + c];
      for (int64_t row = 0; row < d.rows; ++row)
        for (int64_t j = 0; j < d.pairs; ++j)
          sum = dot(d.g[row * d.g_row + j * d.g_pair + f], d.x[row * d.x_row + j * d.x_pair + c], sum);
      d.out[f * d.out_filter + c] = sum;
    }
}

bool bit(const uint64_t* bits, int64_t at) { return bits[at >> 6] >> (at & 63) & 1; }

void gather(const uint16_t* from, int64_t from_pixel, int64_t channels, const uint64_t* bits, int64_t live,
            uint16_t* to, int64_t to_pixel, int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p, from += from_pixel, to += to_pixel) {
    int64_t at = 0;
    for (int64_t c = 0; c < channels; ++c)
      if (bit(bits, c)) to[at++] = from[c];
    std::memset(to + live, 0, (to_pixel - live) * sizeof(*to));
  }
}

void scatter(const uint16_t* from, int64_t from_pixel, const uint64_t* bits, uint16_t* to, int64_t channels,
             int64_t pixels) {
  for (int64_t p = 0; p < pixels; ++p, from += from_pixel, to += channels) {
    int64_t at = 0;
    for (int64_t c = 0; c < channels; ++c) to[c] = bit(bits, c) ? from[at++] : 0;
  }
}

void lanes(const uint16_t* rows, int64_t row, int64_t pairs, uint32_t* to) {
  for (int i = 0; i < kPixelBlock / 2; ++i)
    for (int64_t j = 0; j < pairs; ++j) std::memcpy(to + j * kPixelBlock + i, rows + i * row + 2 * j, sizeof(*to));
}

void interleave(const uint16_t* from, int64_t from_pixel, int64_t pixels, int64_t count, uint32_t* to) {
  for (int64_t p = 0; p < pixels; p += 2, from += 2 * from_pixel, to += count)
    for (int64_t i = 0; i < count; ++i)
      to[i] = from[i] | static_cast<uint32_t>(p + 1 < pixels ? from[from_pixel + i] : 0) << 16;
}

void narrow(const float* from, float scale, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = scale == 0 ? 0 : narrowed(from[i] * scale);
}

template <int... kNumbers>
void fill(PixelKernels& kernels, std::integer_sequence<int, kNumbers...>) {
  constexpr int kHalf = kPixelBlock / 2;
  ((kernels.conv[kNumbers + 1] = conv<kNumbers + 1, kPixelBlock>), ...);
  ((kernels.conv_half[kNumbers + 1] = conv<kNumbers + 1, kHalf>), ...);
  ((kernels.dots[kNumbers + 1] = dots<kNumbers + 1, kPixelBlock>), ...);
  ((kernels.dots_half[kNumbers + 1] = dots<kNumbers + 1, kHalf>), ...);
}

constexpr IsaKernels<PixelKernels> kRows[] = {
#define PK_PIXELS(isa) {Isa::isa, kernels_of<Isa::isa, pixel_kernels_##isa>},
#include "kernel_table.inc"
};

}  // namespace

PixelKernels pixel_kernels_scalar() {
  PixelKernels kernels{};
  kernels.most_pixels = kernels.most_half_pixels = kernels.most_filters = kMost;
  fill(kernels, std::make_integer_sequence<int, kMost>());
  kernels.gather = gather, kernels.scatter = scatter;
  kernels.lanes = lanes, kernels.interleave = interleave, kernels.narrow = narrow;
  return kernels;
}

const PixelKernels& pixel_kernels() {
  return amx_modelled() ? kernels_of<Isa::scalar, pixel_kernels_amx_model>() : best_allowed(kRows);
}

const PixelKernels& vector_pixel_kernels() {
  static_assert(kRows[0].isa == Isa::amx);
  return best_allowed(kRows + 1);
}

bool has_pixel_kernels() { return isa() >= kRows[1].isa; }

}  // namespace prunekernels
