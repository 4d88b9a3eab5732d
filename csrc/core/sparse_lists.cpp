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

// One tile's jobs: pairs [begin, end) of `pairs`, whose filters are `filter`, in ascending order.
void add_tile(const std::vector<LivePair>& pairs, size_t begin, size_t end, const std::vector<int32_t>& filter,
              std::vector<SparseJobs>& blocks) {
  std::vector<int32_t> by_channel(end - begin);
  std::iota(by_channel.begin(), by_channel.end(), static_cast<int32_t>(begin));
  std::stable_sort(by_channel.begin(), by_channel.end(),
                   [&](int32_t a, int32_t b) { return pairs[a].channel < pairs[b].channel; });
  std::vector<SparseJob> jobs;
  for (size_t i = 0; i < by_channel.size();) {
    const int32_t channel = pairs[by_channel[i]].channel;
    size_t same = i;
    while (same < by_channel.size() && pairs[by_channel[same]].channel == channel) ++same;
    for (size_t parts = (same - i + kJobFilters - 1) / kJobFilters; parts > 0; --parts) {
      SparseJob job{channel, static_cast<int32_t>((same - i + parts - 1) / parts), {}, {}};
      for (int j = 0; j < job.filters; ++j, ++i) {
        const auto place = std::lower_bound(filter.begin(), filter.end(), pairs[by_channel[i]].filter);
        job.filter[j] = static_cast<int32_t>(place - filter.begin()), job.pair[j] = by_channel[i];
      }
      jobs.push_back(job);
    }
  }
  std::stable_sort(jobs.begin(), jobs.end(),
                   [](const SparseJob& a, const SparseJob& b) { return a.filters > b.filters; });
  for (size_t i = 0; i < jobs.size(); i += kBlockJobs) {
    SparseJobs block{static_cast<int32_t>(filter.size()), {}, {}};
    std::copy(filter.begin(), filter.end(), block.filter);
    for (SparseJob& job : block.job) job.channel = -1;
    std::copy_n(jobs.begin() + i, std::min<size_t>(kBlockJobs, jobs.size() - i), block.job);
    blocks.push_back(block);
  }
}

}  // namespace

SparseLists::SparseLists(const MaskTable& mask) {
  const std::vector<LivePair> pairs = live_pairs(mask);
  forward_ = add_results(pairs, mask, true);
  grad_input_ = add_results(pairs, mask, false);
  grad_weight_ = add_jobs(pairs, mask);
}

// At a multiple of 16 bytes.
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
  std::vector<std::vector<const LivePair*>> read_by(results);
  for (const LivePair& pair : pairs) read_by[forward ? pair.filter : pair.channel].push_back(&pair);

  std::vector<int32_t> order(results), begin{0};
  std::iota(order.begin(), order.end(), 0);
  const auto busier = [&](int32_t a, int32_t b) {
    return read_by[a].size() != read_by[b].size() ? read_by[a].size() > read_by[b].size()
                                                  : (slot[a] != kDead) > (slot[b] != kDead);
  };
  std::stable_sort(order.begin(), order.end(), busier);

  std::vector<SparseStep> steps;
  std::vector<SparseStep> by_operand(operands);
  for (int64_t first = 0; first < results; first += kBlockResults) {
    for (SparseStep& step : by_operand) step.live = 0;
    for (int64_t i = first; i < std::min(first + kBlockResults, results); ++i)
      for (const LivePair* pair : read_by[order[i]]) {
        const int32_t operand = forward ? pair->channel : pair->filter;
        SparseStep& step = by_operand[operand];
        step.operand = operand, step.weight_operand = forward ? pair->channel_in_group : operand;
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
  std::vector<SparseJobs> blocks;
  std::vector<int32_t> filter;
  size_t begin = 0;
  for (size_t i = 0; i <= pairs.size(); ++i) {
    const bool ends = i == pairs.size(), other = !ends && (filter.empty() || pairs[i].filter != filter.back());
    if (!filter.empty() && (ends || (other && static_cast<int64_t>(filter.size()) == per_tile))) {
      add_tile(pairs, begin, i, filter, blocks);
      filter.clear(), begin = i;
    }
    if (other) filter.push_back(pairs[i].filter);
  }
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
