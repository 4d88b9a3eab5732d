#include "plan/plan_cache.h"

#include <cstring>
#include <mutex>
#include <unordered_map>

namespace prunekernels {
namespace {

constexpr size_t kMostEntries = 4096;

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

struct Cache {
  std::mutex mutex;
  std::unordered_map<PlanKey, Measured, Hash, Equal> plans;
};

Cache& cache() {
  static Cache* const cache = new Cache;  // never destroyed: threads may outlive static destructors
  return *cache;
}

}  // namespace

namespace plan_cache {

std::optional<Plan> find(const PlanKey& key) {
  const std::lock_guard lock(cache().mutex);
  const auto at = cache().plans.find(key);
  return at == cache().plans.end() ? std::nullopt : std::optional(at->second.plan);
}

void keep(const PlanKey& key, const Measured& measured) {
  const std::lock_guard lock(cache().mutex);
  cache().plans.emplace(key, measured);
}

bool full() {
  const std::lock_guard lock(cache().mutex);
  return cache().plans.size() >= kMostEntries;
}

std::vector<std::pair<PlanKey, Measured>> entries() {
  const std::lock_guard lock(cache().mutex);
  return {cache().plans.begin(), cache().plans.end()};
}

void clear() {
  const std::lock_guard lock(cache().mutex);
  cache().plans.clear();
}

}  // namespace plan_cache
}  // namespace prunekernels
