// Convolutions over pixels by the compiled instructions of AMX against the same by their model: equal to the bit.
// Where the CPU has no AMX, its instructions are trapped (traps.h).
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <random>
#include <vector>

#include "core/result_blocks.h"
#include "cpu/kernels/isa.h"
#include "cpu/kernels/pixel_conv.h"
#include "cpu/kernels/pixel_grad_weight.h"
#include "traps.h"

namespace prunekernels {

namespace {
bool modelled;
}

Isa isa() { return Isa::amx; }  // in isa.cpp's stead
bool amx_modelled() { return modelled; }

namespace {

std::mt19937 random_bits(0);

// Random numbers, some of them subnormal or zero.
std::vector<uint16_t> numbers(int64_t count) {
  std::vector<uint16_t> made(count);
  for (uint16_t& bits : made) {
    const uint32_t r = random_bits();
    const uint32_t exponent = r >> 8 & 15 ? 120 + (r >> 12 & 7) : r >> 12 & 1;
    bits = static_cast<uint16_t>((r & 0x807f) | exponent << 7);
  }
  return made;
}

struct List {
  List(int64_t channels, int64_t live) : slot(channels, -1), bits((channels + 63) / 64) {
    for (int64_t c = 0; c < channels; ++c)
      if (c * live / channels != (c + 1) * live / channels) {
        slot[c] = static_cast<int32_t>(index.size());
        bits[c / 64] |= uint64_t{1} << c % 64;
        index.push_back(static_cast<int32_t>(c));
      }
    list = {index.data(), slot.data(), bits.data(), live, channels};
  }
  std::vector<int32_t> index, slot;
  std::vector<uint64_t> bits;
  ChannelList list;
};

struct Case {
  int64_t pixels_down, pixels_across, channels, live_channels, filters, live_filters, taps, stride, dilation;
};

using Pixels = std::vector<uint16_t>;

Pixels convolve(PixelConv::Direction direction, const ConvShape& s, const List& filters, const List& channels,
                const Pixels& operand, const Pixels& weight, const std::vector<float>& bias, int64_t results) {
  const bool forward = direction == PixelConv::kForward;
  const List &to = forward ? filters : channels, &from = forward ? channels : filters;
  const PixelConv conv(direction, s, nullptr, whole_blocks(to.list.live, from.list.live), filters.list, channels.list,
                       1);
  std::vector<uint32_t> packed(conv.weight_words());
  Pixels scratch(std::max(conv.pack_scratch(), conv.scratch_elements())), result(results);
  conv.pack_weights(weight.data(), packed.data(), 0, conv.packs(), scratch.data());
  std::vector<float> start(conv.width());
  for (int64_t i = 0; forward && i < filters.list.live; ++i) start[conv.place(i)] = bias[i];
  for (int64_t task = 0; task < conv.tasks(); ++task)
    conv.run(operand.data(), packed.data(), start.data(), result.data(), task, scratch.data());
  return result;
}

Pixels grad_weight(const ConvShape& s, const List& filters, const List& channels, const Pixels& x, const Pixels& grad,
                   int64_t results) {
  const PixelGradWeight work(s, nullptr, filters.list, channels.list);
  std::vector<float> partial(work.partial_floats());
  std::vector<uint32_t> scratch(work.scratch_words());
  work.run(x.data(), grad.data(), 0, work.blocks(), partial.data(), scratch.data());
  Pixels result(results);
  work.write(partial.data(), 1, nullptr, result.data(), 0, s.K);
  return result;
}

bool same(const char* what, const Case& c, const Pixels& a, const Pixels& b) {
  int64_t different = 0;
  for (size_t i = 0; i < a.size(); ++i) different += a[i] != b[i];
  if (different)
    std::fprintf(stderr, "%s, %ldx%ld pixels, %ld of %ld channels, %ld of %ld filters, %ld taps: %ld numbers differ\n",
                 what, c.pixels_down, c.pixels_across, c.live_channels, c.channels, c.live_filters, c.filters, c.taps,
                 different);
  return different == 0;
}

bool check(const Case& c) {
  ConvShape s{1, c.channels, c.pixels_down, c.pixels_across, c.filters, c.taps, c.taps, 0, 0, 1, {}, {}, {}};
  for (int i = 0; i < 2; ++i) s.stride[i] = c.stride, s.dilation[i] = c.dilation, s.padding[i] = c.taps / 2;
  s.P = conv_out_size(s.H, s.R, c.stride, c.taps / 2, c.dilation);
  s.Q = conv_out_size(s.W, s.S, c.stride, c.taps / 2, c.dilation);
  const List filters(c.filters, c.live_filters), channels(c.channels, c.live_channels);
  const int64_t in = s.H * s.W * s.C, out = s.P * s.Q * s.K, weights = s.K * s.taps() * s.C;
  const Pixels x = numbers(in), weight = numbers(weights), grad = numbers(out);
  std::vector<float> bias(c.filters);
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i) / 7;
  Pixels y[2], grad_x[2], grad_w[2];
  for (int i = 0; i < 2; ++i) {
    modelled = i;
    y[i] = convolve(PixelConv::kForward, s, filters, channels, x, weight, bias, out);
    grad_x[i] = convolve(PixelConv::kGradInput, s, filters, channels, grad, weight, bias, in);
    grad_w[i] = grad_weight(s, filters, channels, x, grad, weights);
  }
  return same("output", c, y[0], y[1]) & same("gradient of the input", c, grad_x[0], grad_x[1]) &
         same("gradient of the weight", c, grad_w[0], grad_w[1]);
}

}  // namespace
}  // namespace prunekernels

int main() {
  traps::install();
  syscall(SYS_arch_prctl, 0x1023, 18);
  bool right = true;
  for (const prunekernels::Case& c : {
           prunekernels::Case{1, 40, 9, 2, 8, 5, 1, 1, 1},      // few pairs: vectors
           prunekernels::Case{1, 40, 40, 34, 40, 33, 1, 1, 1},  // two tiles of pixels, padded pairs, two blocks
           prunekernels::Case{1, 16, 70, 64, 16, 16, 1, 1, 1},
           prunekernels::Case{1, 33, 20, 14, 70, 66, 1, 1, 1},  // the gradient of the weight: x is turned
           prunekernels::Case{5, 7, 20, 11, 40, 20, 3, 1, 1},
           prunekernels::Case{5, 33, 20, 20, 48, 48, 3, 1, 1},   // in place
           prunekernels::Case{5, 33, 20, 20, 48, 45, 3, 1, 1},   // in place, with zeros
           prunekernels::Case{14, 14, 20, 12, 40, 36, 3, 1, 1},  // rows that share tiles
           prunekernels::Case{4, 4, 20, 12, 80, 70, 3, 1, 1},    // patches
           prunekernels::Case{9, 9, 12, 10, 20, 18, 3, 2, 1},
           prunekernels::Case{9, 21, 12, 7, 20, 18, 3, 1, 2},
       })
    right &= check(c);
  std::printf("%ld instructions trapped\n", traps::count);
  return right ? 0 : 1;
}
