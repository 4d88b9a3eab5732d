#include "plan/plan_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace prunekernels {
namespace {

constexpr size_t kMostEntries = 16384;
constexpr size_t kMostAlike = 256;  // neighbours that are searched

struct Hash {
  size_t operator()(const PlanKey& key) const {
    uint32_t words[sizeof(PlanKey) / sizeof(uint32_t)];
    std::memcpy(words, &key, sizeof(key));
    uint64_t hash = 0;
    for (uint32_t word : words) {
      hash = (hash ^ word) * 0x9e3779b97f4a7c15;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

struct Equal {
  bool operator()(const PlanKey& a, const PlanKey& b) const { return std::memcmp(&a, &b, sizeof(a)) == 0; }
};

template <typename Value>
using ByKey = std::unordered_map<PlanKey, Value, Hash, Equal>;

struct Cache {
  std::mutex mutex;
  ByKey<Known> known;
  ByKey<std::vector<PlanKey>> settled;  // by kind, the problems that trials have settled
  int64_t trials = 0;
};

Cache& cache() {
  static Cache* const cache = new Cache;  // never destroyed: threads may outlive static destructors
  return *cache;
}

// What neighbours have in common. Depthwise convolutions of different widths are not alike in their groups.
PlanKey kind_of(PlanKey key) {
  key.live_filters = key.live_inputs = key.live_kernels = 0;
  key.N = key.K = key.C = 0;
  return key;
}

double distance(const PlanKey& a, const PlanKey& b) {
  const auto apart = [](double x, double y) { return std::abs(std::log2(std::max(x, 1.) / std::max(y, 1.))); };
  return std::max({apart(a.N, b.N), apart(a.K, b.K), apart(a.C, b.C),
                   apart(1. * a.K * a.live_filters, 1. * b.K * b.live_filters),
                   apart(1. * a.C * a.live_inputs, 1. * b.C * b.live_inputs), apart(a.live_kernels, b.live_kernels)});
}

// For problems nearby. Called with the lock held.
void remember(const PlanKey& key) {
  std::vector<PlanKey>& alike = cache().settled[kind_of(key)];
  if (alike.size() >= kMostAlike) alike.erase(alike.begin());
  alike.push_back(key);
}

bool is_aligned(const PlanKey& key) { return key.C % 16 == 0 && key.K % 16 == 0; }

}  // namespace

namespace plan_cache {

std::optional<Known> find(const PlanKey& key) {
  const std::lock_guard lock(cache().mutex);
  const auto at = cache().known.find(key);
  return at == cache().known.end() ? std::nullopt : std::optional(at->second);
}

std::optional<Neighbour> nearest(const PlanKey& key) {
  const std::lock_guard lock(cache().mutex);
  const auto alike = cache().settled.find(kind_of(key));
  if (alike == cache().settled.end()) return std::nullopt;
  const auto nearer = [&](const PlanKey& a, const PlanKey& b) { return distance(a, key) < distance(b, key); };
  const PlanKey& found = *std::min_element(alike->second.begin(), alike->second.end(), nearer);
  return Neighbour{cache().known.at(found), distance(found, key), is_aligned(found) == is_aligned(key)};
}

void begin(const PlanKey& key, const Known& known) {
  const std::lock_guard lock(cache().mutex);
  if (cache().known.emplace(key, known).second && known.settled && known.trials.begun()) remember(key);
}

void add(const PlanKey& key, Plan plan, double ms) {
  const std::lock_guard lock(cache().mutex);
  ++cache().trials;
  const auto at = cache().known.find(key);
  if (at == cache().known.end() || at->second.settled) return;  // cleared, or settled by another thread
  Known& known = at->second;
  known.trials.add(plan, ms);
  known.plan = known.trials.best();
  known.settled = known.trials.settled();
  if (!known.settled) return;
  remember(key);
}

bool full() {
  const std::lock_guard lock(cache().mutex);
  return cache().known.size() >= kMostEntries;
}

int64_t trials() {
  const std::lock_guard lock(cache().mutex);
  return cache().trials;
}

std::vector<std::pair<PlanKey, Known>> entries() {
  const std::lock_guard lock(cache().mutex);
  return {cache().known.begin(), cache().known.end()};
}

void clear() {
  const std::lock_guard lock(cache().mutex);
  cache().known.clear(), cache().settled.clear();
}

}  // namespace plan_cache
}  // namespace prunekernels
