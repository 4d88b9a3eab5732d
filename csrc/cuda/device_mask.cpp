#include "cuda/device_mask.h"

#include "check.h"
#include "cuda/host_cache.h"
#include "cuda/kernels/channel_copy.h"
#include "ops/conv_args.h"
#include "ops/parameter_args.h"

namespace prunekernels {
namespace {

// Several lists in one upload, each on a 16-byte boundary.
class Upload {
 public:
  size_t add(const int32_t* words, size_t count) {
    words_.resize((words_.size() + 3) / 4 * 4);
    const size_t at = words_.size();
    words_.insert(words_.end(), words, words + count);
    return at;
  }
  size_t add(const std::vector<int32_t>& words) { return add(words.data(), words.size()); }
  const std::vector<int32_t>& words() const { return words_; }

 private:
  std::vector<int32_t> words_;
};

std::vector<int32_t> padded(const int32_t* index, int64_t live, int64_t count) {
  std::vector<int32_t> list(index, index + live);
  list.resize(count, kDead);
  return list;
}

// The same table between all filters and all channels: only pairs differ from a table without masks.
std::vector<int32_t> at_full_width(std::vector<int32_t> words) {
  const MaskTable table(words.data());
  const int64_t K = table[kFilters], C = table[kChannels], G = table[kGroups];
  words[kLiveGroups] = static_cast<int32_t>(G);
  words[kOutPerGroup] = static_cast<int32_t>(K / G);
  words[kInPerGroup] = static_cast<int32_t>(C / G);
  int32_t* lists = words.data() + kHeaderWords;
  for (const int64_t count : {K, K, C, C})
    for (int64_t i = 0; i < count; ++i) *lists++ = static_cast<int32_t>(i);
  return words;
}

// A dead result channel proves that nothing leaked in its group, and stands for the dead ones; in a group without one,
// any channel proves it, and there is nothing to prove if the operand has no dead channel there.
std::vector<int32_t> find_sentinels(const int32_t* result, int64_t results, const int32_t* operand, int64_t operands,
                                    int64_t groups) {
  std::vector<int32_t> words;
  const auto is_dead = [](int32_t slot) { return slot == kDead; };
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t* const first = result + g * results / groups;
    const int32_t* const last = first + results / groups;
    const int32_t* const other = operand + g * operands / groups;
    const int32_t* const dead = std::find_if(first, last, is_dead);
    if (dead != last)
      words.push_back(sentinel_word(dead - result, true));
    else if (std::any_of(other, other + operands / groups, [](int32_t slot) { return slot < 0; }))
      words.push_back(sentinel_word(first - result, false));
  }
  return words;
}

std::vector<int32_t> kept_filter_list(const MaskTable& table) {
  std::vector<int32_t> list(table[kFilters]);
  for (size_t k = 0; k < list.size(); ++k) list[k] = table.out_slot()[k] == kDead ? kDead : static_cast<int32_t>(k);
  return list;
}

// As int64, low word first: a conversion on the device would be a kernel that other streams do not wait for.
std::vector<int32_t> constant_filters(const MaskTable& table) {
  std::vector<int32_t> words;
  for (int64_t k = 0; k < table[kFilters]; ++k)
    if (table.out_slot()[k] == kConstant) words.insert(words.end(), {static_cast<int32_t>(k), 0});
  return words;
}

ChannelSide make_side(const int32_t* index, int64_t live, int64_t channels, bool pads) {
  ChannelSide side{channels, live, pads ? packed_count(live) : live};
  side.identity = live == channels && std::find(index, index + live, kDead) == index + live;
  if (side.identity) side.padded = live;
  side.granule = channel_granule(padded(index, live, side.padded).data(), side.padded, channels);
  side.host_index = index;
  return side;
}

}  // namespace

ChannelView ChannelSide::view(Element element) const {
  if (identity) return {channels, channels, nullptr, nullptr, list_is_vectors(nullptr, channels, channels, element)};
  return {channels, live, index, slot, list_is_vectors(host_index, live, channels, element)};
}

DeviceMask::DeviceMask(std::vector<int32_t> words, at::Device device)
    : words_(std::move(words)), table_(words_.data()), device_(device) {
  const bool one_group = table_[kGroups] == 1;
  out_ = make_side(table_.out_index(), table_.out_count(), table_[kFilters], one_group);
  in_ = make_side(table_.in_index(), table_.in_count(), table_[kChannels], one_group);
  dense_words_ = at_full_width(words_);

  Upload block;
  const size_t table = block.add(words_);
  const size_t dense = block.add(dense_words_);
  const size_t out = block.add(padded(out_.host_index, out_.live, out_.padded));
  const size_t in = block.add(padded(in_.host_index, in_.live, in_.padded));
  const size_t filters = block.add(kept_filter_list(table_));
  const std::vector<int32_t> seen[] = {
      find_sentinels(table_.in_slot(), in_.channels, table_.out_slot(), out_.channels, table_[kGroups]),
      find_sentinels(table_.out_slot(), out_.channels, table_.in_slot(), in_.channels, table_[kGroups])};
  const size_t sentinels[] = {block.add(seen[0]), block.add(seen[1])};

  const at::Tensor uploaded = keep(device::upload(block.words(), device));
  const auto* const there = uploaded.const_data_ptr<int32_t>();
  device_words_ = uploaded.narrow(0, static_cast<int64_t>(table), static_cast<int64_t>(words_.size()));
  device_table_ = there + table, device_dense_ = there + dense;
  out_.index = there + out, in_.index = there + in;
  out_.slot = device_table_ + (table_.out_slot() - words_.data());
  in_.slot = device_table_ + (table_.in_slot() - words_.data());
  pairs_ = reinterpret_cast<const uint32_t*>(in_.slot + in_.channels);
  kept_filters_ = there + filters;
  constants_ = keep(device::upload(constant_filters(table_), device).view(at::kLong));
  for (int i = 0; i < 2; ++i) sentinels_[i] = {there + sentinels[i], static_cast<int64_t>(seen[i].size())};
}

PackMask DeviceMask::pack() const { return pack_mask(words_.data(), device_table_); }
PackMask DeviceMask::pack_dense() const { return pack_mask(dense_words_.data(), device_dense_); }

const int32_t* DeviceMask::keep_late(const char* op, const std::vector<int32_t>& words) const {
  PK_CHECK(!device::capturing(), op, "mask",
           "a mask that this plan has met before the capture of a graph begins (run a step first)", "a new one");
  return keep(words, device_);
}

DeviceMask::Lists& DeviceMask::lists(bool of_filters, int64_t tile, int64_t chunk) const {
  const std::array<int64_t, 3> key{of_filters, tile, chunk};
  auto found = lists_.find(key);
  if (found == lists_.end()) {
    Lists made{(of_filters ? filter_tile_lists : channel_tile_lists)(table_, tile, chunk), 0};
    const int64_t operands = of_filters ? in_.live : out_.live;
    made.share = made.host.share((operands + chunk - 1) / chunk);
    found = lists_.emplace(key, std::move(made)).first;
  }
  return found->second;
}

double DeviceMask::listed_share(bool of_filters, int64_t tile, int64_t chunk) const {
  const std::lock_guard lock(mutex_);
  return lists(of_filters, tile, chunk).share;
}

DeviceTileLists DeviceMask::tile_lists(const char* op, bool of_filters, int64_t tile, int64_t chunk) const {
  const std::lock_guard lock(mutex_);
  Lists& found = lists(of_filters, tile, chunk);
  const size_t tiles = found.host.first.size();
  if (!found.first) {
    std::vector<int32_t> words = found.host.first;
    words.insert(words.end(), found.host.chunks.begin(), found.host.chunks.end());
    found.first = keep_late(op, words);
  }
  return {found.first, found.first + tiles, found.host.longest()};
}

const SparseLists& DeviceMask::sparse_lists(const char* op, const int32_t** device_words) const {
  const std::lock_guard lock(mutex_);
  if (!sparse_) {
    Sparse made{SparseLists(table_), nullptr};
    made.words = keep_late(op, made.host.words());
    sparse_.emplace(std::move(made));
  }
  *device_words = sparse_->words;
  return sparse_->host;
}

namespace {

std::shared_ptr<const DeviceMask> find_device_mask(const char* op, const char* argument, const at::Tensor& mask,
                                                   const at::Tensor& like) {
  check_table_tensor(op, argument, mask, like.device());
  return std::static_pointer_cast<const DeviceMask>(
      host_cache::find(op, argument, mask, -1, [&](const std::vector<int32_t>& words) {
        check_table_words(op, argument, words.data(), static_cast<int64_t>(words.size()));
        return std::make_shared<const DeviceMask>(words, like.device());
      }));
}

}  // namespace

std::shared_ptr<const DeviceMask> device_mask(const char* op, const char* argument,
                                              const std::optional<at::Tensor>& mask, int64_t K, int64_t C, int64_t G,
                                              const at::Tensor& like) {
  if (!mask) return nullptr;
  auto found = find_device_mask(op, argument, *mask, like);
  if (C < 0) {
    check_table_filters(op, argument, found->table(), K);
    return found;
  }
  check_table_sizes(op, argument, found->table(), K, C, G);
  return found->table().nothing_dead() ? nullptr : found;
}

std::shared_ptr<const DeviceMask> device_row_mask(const char* op, const std::optional<at::Tensor>& mask,
                                                  const at::Tensor& parameter) {
  if (!mask) return nullptr;
  auto found = find_device_mask(op, "masks", *mask, parameter);
  return masks_rows(op, found->table(), parameter) ? found : nullptr;
}

}  // namespace prunekernels
