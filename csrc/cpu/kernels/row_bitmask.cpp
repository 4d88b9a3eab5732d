#include "cpu/kernels/row_bitmask.h"

#include <algorithm>

#include "core/mask_table.h"

namespace prunekernels {
namespace {

void set_range(uint32_t* bits, int64_t begin, int64_t end) {
  for (int64_t word = begin >> 5; word <= (end - 1) >> 5; ++word) {
    const int64_t low = std::max<int64_t>(begin - word * 32, 0), high = std::min<int64_t>(end - word * 32, 32);
    bits[word] |= ((high == 32 ? 0u : 1u << high) - 1) & ~((1u << low) - 1);
  }
}

// Calls visit(begin, end) for each stretch of set bits.
template <typename Visit>
void each_run(const uint32_t* bits, int64_t count, Visit visit) {
  int64_t begin = -1;
  for (int64_t first = 0; first < count; first += 32) {
    const int64_t last = std::min<int64_t>(count - first, 32);
    const uint32_t word = bits[first >> 5];
    if (begin >= 0 ? word == ~0u : word == 0) continue;  // nothing starts or ends here
    for (int64_t i = 0; i < last; ++i) {
      const bool set = word >> i & 1;
      if (set == (begin >= 0)) continue;
      if (!set) visit(begin, first + i);
      begin = set ? first + i : -1;
    }
  }
  if (begin >= 0) visit(begin, count);
}

}  // namespace

void spread_bits(const uint32_t* pairs, int64_t channels, int64_t taps, bool channels_last, uint32_t* bits) {
  std::fill(bits, bits + bit_words(channels * taps), 0u);
  each_run(pairs, channels, [&](int64_t begin, int64_t end) {
    if (!channels_last) {
      set_range(bits, begin * taps, end * taps);
      return;
    }
    for (int64_t t = 0; t < taps; ++t) set_range(bits, t * channels + begin, t * channels + end);
  });
}

void slot_bits(const int32_t* out_slot, int64_t filters, uint32_t* bits) {
  std::fill(bits, bits + bit_words(filters), 0u);
  for (int64_t k = 0; k < filters; ++k)
    if (out_slot[k] != kDead) bits[k >> 5] |= 1u << (k & 31);
}

}  // namespace prunekernels
