#include "core/result_blocks.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace prunekernels {
namespace {

constexpr int64_t kQuad = 4, kHalf = 16 / kQuad, kWhole = 32 / kQuad;  // the last two in quads
// Time of a pair that up to 16 results read, of one that 32 read, and of what a block does besides, in such pairs and
// taps.
constexpr double kHalfCost = 0.6, kBlockCost = 3;

using Bits = std::vector<uint64_t>;

int64_t count_of(const Bits& bits) {
  return std::accumulate(bits.begin(), bits.end(), int64_t{0},
                         [](int64_t sum, uint64_t word) { return sum + __builtin_popcountll(word); });
}

// The longest run that all stretches of neighbours are made of.
int64_t run_of(const int32_t* begin, const int32_t* end) {
  int64_t run = 0, length = 0;
  for (const int32_t* pair = begin; pair < end; ++pair) {
    ++length;
    if (pair + 1 < end && pair[1] == pair[0] + 1) continue;
    run = std::gcd(run, length), length = 0;
  }
  return run;
}

}  // namespace

ResultBlocks whole_blocks(int64_t results, int64_t operands) {
  const int64_t pairs = (operands + 1) / 2;
  ResultBlocks all{{}, std::vector<int32_t>(pairs), 0};
  std::iota(all.pairs.begin(), all.pairs.end(), 0);
  for (int64_t first = 0; first < results; first += kWhole * kQuad)
    all.blocks.push_back({first, std::min(kWhole * kQuad, results - first), 0, pairs, pairs});
  return all;
}

ResultBlocks cut_into_blocks(const TileLists& quads, int64_t results, int64_t operands, int64_t taps) {
  const int64_t count = quads.tiles(), words = (operands + 127) / 128;
  std::vector<Bits> reads(count, Bits(words));
  for (int64_t q = 0; q < count; ++q)
    for (int32_t i = quads.first[q]; i < quads.first[q + 1]; ++i)
      reads[q][quads.chunks[i] >> 6] |= uint64_t{1} << (quads.chunks[i] & 63);

  // The least cost of the quads from q on, and how many of them the first block then has.
  std::vector<double> least(count + 1, 0);
  std::vector<int64_t> length(count + 1, 0);
  for (int64_t q = count - 1; q >= 0; --q) {
    Bits read(words);
    least[q] = std::numeric_limits<double>::infinity();
    for (int64_t n = 1; n <= std::min(kWhole, count - q); ++n) {
      for (int64_t w = 0; w < words; ++w) read[w] |= reads[q + n - 1][w];
      const double pairs = static_cast<double>(count_of(read)) + kBlockCost / static_cast<double>(taps);
      const double cost = pairs * (n <= kHalf ? kHalfCost : 1) + least[q + n];
      if (cost < least[q]) least[q] = cost, length[q] = n;
    }
  }

  ResultBlocks found{{}, {}, least[0]};
  for (int64_t q = 0; q < count; q += length[q]) {
    Bits read(words);
    for (int64_t n = 0; n < length[q]; ++n)
      for (int64_t w = 0; w < words; ++w) read[w] |= reads[q + n][w];
    const auto begin = static_cast<int64_t>(found.pairs.size());
    ResultBlock block{q * kQuad, std::min(length[q] * kQuad, results - q * kQuad), begin, begin, 0};
    for (int64_t w = 0; w < words; ++w)
      for (uint64_t bits = read[w]; bits; bits &= bits - 1)
        found.pairs.push_back(static_cast<int32_t>(w * 64 + __builtin_ctzll(bits)));
    block.end = static_cast<int64_t>(found.pairs.size());
    block.run = run_of(found.pairs.data() + block.begin, found.pairs.data() + block.end);
    found.blocks.push_back(block);
  }
  return found;
}

}  // namespace prunekernels
