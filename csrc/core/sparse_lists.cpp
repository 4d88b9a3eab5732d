#include "core/sparse_lists.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>

namespace prunekernels {
namespace {

// Filters of a tile such that a channel meets about this many of them: a job is nearly full, rarely two.
constexpr double kFiltersPerJob = 6;

// The live pairs, filter by filter.
std::vector<LivePair> live_pairs(const MaskTable& mask) {
  const int64_t Cg = mask.channels_per_group(), Kg = mask[kFilters] / mask[kGroups];
  std::vector<LivePair> pairs;
  pairs.reserve(mask[kLivePairs]);
  for (int32_t k = 0; k < mask[kFilters]; ++k)
    mask.each_live_channel(
        k, [&](int64_t c) { pairs.push_back({k, static_cast<int32_t>(k / Kg * Cg + c), static_cast<int32_t>(c)}); });
  return pairs;
}

int64_t filters_per_tile(const MaskTable& mask) {
  const int64_t live = mask[kLivePairs];
  if (live == 0) return kBlockFilters;
  const int64_t filters = mask[kFilters] - std::count(mask.out_slot(), mask.out_slot() + mask[kFilters], kDead);
  const double density = static_cast<double>(live) / static_cast<double>(filters * mask[kInPerGroup]);
  return std::clamp<int64_t>(static_cast<int64_t>(kFiltersPerJob / density), kJobFilters, kBlockFilters);
}

// From the count of each key's items to the place where they begin; one more entry holds the end.
std::vector<int32_t> begins(std::vector<int32_t> counts) {
  counts.push_back(0);
  std::exclusive_scan(counts.begin(), counts.end(), counts.begin(), 0);
  return counts;
}

// The jobs of one tile: the pairs [first, end), whose filters are all of a block's.
class TileJobs {
 public:
  TileJobs(const std::vector<LivePair>& pairs, int32_t first, int32_t end, int64_t channels) {
    std::vector<int32_t> readers(channels, 0);
    for (int32_t i = first; i < end; ++i) ++readers[pairs[i].channel];
    const std::vector<int32_t> begin = begins(readers);
    std::vector<int32_t> at = begin, by_channel(end - first), place(end - first);
    for (int32_t i = first; i < end; ++i) {
      if (filters_.empty() || pairs[i].filter != filters_.back()) filters_.push_back(pairs[i].filter);
      const int32_t to = at[pairs[i].channel]++;
      by_channel[to] = i, place[to] = static_cast<int32_t>(filters_.size()) - 1;
    }
    for (int32_t c = 0; c < channels; ++c) {
      int32_t i = begin[c];
      for (int32_t parts = (readers[c] + kJobFilters - 1) / kJobFilters; parts > 0; --parts) {
        SparseJob job{c, (begin[c + 1] - i + parts - 1) / parts, {}, {}};
        for (int j = 0; j < job.filters; ++j, ++i)
          job.filter[j] = static_cast<uint8_t>(place[i]), job.pair[j] = by_channel[i];
        jobs_.push_back(job);
      }
    }
  }

  void add_to(std::vector<SparseJobs>& blocks) const {
    int32_t added = 0;
    for (int32_t size = kJobFilters; size > 0; --size)
      for (const SparseJob& job : jobs_) {
        if (job.filters != size) continue;
        if (added++ % kBlockJobs == 0) {
          blocks.push_back({static_cast<int32_t>(filters_.size()), 0, {}, {}});
          std::copy(filters_.begin(), filters_.end(), blocks.back().filter);
        }
        blocks.back().job[blocks.back().jobs++] = job;
      }
  }

 private:
  std::vector<int32_t> filters_;
  std::vector<SparseJob> jobs_;
};

}  // namespace

SparseLists::SparseLists(const MaskTable& mask) {
  const std::vector<LivePair> pairs = live_pairs(mask);
  forward_ = add_results(pairs, mask, true);
  grad_input_ = add_results(pairs, mask, false);
  grad_weight_ = add_jobs(pairs, mask);
}

// Appends the items at a multiple of 16 bytes and returns that place, in words.
template <typename T>
int64_t SparseLists::append(const std::vector<T>& items) {
  const size_t at = (words_.size() + 3) / 4 * 4, words = items.size() * sizeof(T) / sizeof(int32_t);
  words_.resize(at + words, 0);
  if (words) std::memcpy(words_.data() + at, items.data(), words * sizeof(int32_t));
  return static_cast<int64_t>(at);
}

ResultLists SparseLists::add_results(const std::vector<LivePair>& pairs, const MaskTable& mask, bool forward) {
  const int64_t results = mask[forward ? kFilters : kChannels], operands = mask[forward ? kChannels : kFilters];
  const int32_t* slot = forward ? mask.out_slot() : mask.in_slot();
  const auto result_of = [&](const LivePair& pair) { return forward ? pair.filter : pair.channel; };
  std::vector<int32_t> counts(results, 0);
  for (const LivePair& pair : pairs) ++counts[result_of(pair)];
  const std::vector<int32_t> first_read = begins(counts);
  std::vector<int32_t> at = first_read, reads(pairs.size());  // the pairs of each result
  for (size_t i = 0; i < pairs.size(); ++i) reads[at[result_of(pairs[i])]++] = static_cast<int32_t>(i);

  std::vector<int32_t> order(results), begin{0};
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return counts[a] != counts[b] ? counts[a] > counts[b] : (slot[a] != kDead) > (slot[b] != kDead);
  });

  std::vector<SparseStep> steps, by_operand(operands);
  for (int64_t first = 0; first < results; first += kBlockResults) {
    for (SparseStep& step : by_operand) step.live = 0;
    for (int64_t i = first; i < std::min(first + kBlockResults, results); ++i)
      for (int32_t r = first_read[order[i]]; r < first_read[order[i] + 1]; ++r) {
        const LivePair& pair = pairs[reads[r]];
        SparseStep& step = by_operand[forward ? pair.channel : pair.filter];
        step.operand = forward ? pair.channel : pair.filter;
        step.weight_operand = forward ? pair.channel_in_group : pair.filter;
        step.live |= 1u << (i - first);
      }
    std::copy_if(by_operand.begin(), by_operand.end(), std::back_inserter(steps),
                 [](const SparseStep& step) { return step.live != 0; });
    begin.push_back(static_cast<int32_t>(steps.size()));
  }
  for (int32_t& result : order)
    if (slot[result] == kDead) result = ~result;
  const int64_t blocks = static_cast<int64_t>(begin.size()) - 1;
  const int64_t at_order = append(order), at_begin = append(begin);
  return {blocks, at_order, at_begin, append(steps)};
}

JobLists SparseLists::add_jobs(const std::vector<LivePair>& pairs, const MaskTable& mask) {
  const int64_t words = pair_words(mask.channels_per_group()), per_tile = filters_per_tile(mask);
  const int32_t end = static_cast<int32_t>(pairs.size());
  std::vector<SparseJobs> blocks;
  int32_t first = 0, filters = 0;
  for (int32_t i = 0; i < end; ++i) {
    if (i && pairs[i].filter == pairs[i - 1].filter) continue;
    if (filters++ < per_tile) continue;
    TileJobs(pairs, first, i, mask[kChannels]).add_to(blocks);
    first = i, filters = 1;
  }
  if (first < end) TileJobs(pairs, first, end, mask[kChannels]).add_to(blocks);
  std::vector<int32_t> rank;
  int32_t before = 0;
  for (int64_t k = 0; k < mask[kFilters]; ++k)
    for (int64_t w = 0; w < words; ++w) {
      rank.push_back(before);
      before += __builtin_popcount(mask.pairs(k)[w]);
    }
  const int64_t at_jobs = append(blocks);
  return {static_cast<int64_t>(blocks.size()), static_cast<int64_t>(pairs.size()), at_jobs, append(rank)};
}

}  // namespace prunekernels
