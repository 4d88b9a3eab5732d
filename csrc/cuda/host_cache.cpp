#include "cuda/host_cache.h"

#include <mutex>
#include <tuple>
#include <unordered_map>

#include "check.h"

namespace prunekernels::host_cache {
namespace {

constexpr size_t kMostEntries = 4096;  // tensors alive at once; what is dropped is only read again

struct Key {
  const c10::StorageImpl* storage;
  int64_t offset, count, stride, parameter;
  bool operator==(const Key& o) const {
    return std::tie(storage, offset, count, stride, parameter) ==
           std::tie(o.storage, o.offset, o.count, o.stride, o.parameter);
  }
};

struct Hash {
  size_t operator()(const Key& k) const {
    uint64_t hash = reinterpret_cast<uintptr_t>(k.storage);
    for (int64_t part : {k.offset, k.count, k.stride, k.parameter}) {
      hash = (hash ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

using Value = std::shared_ptr<const device::DeviceBuffers>;

struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;  // also keeps its address from being another's
  const void* data;
  int64_t version;
  uint64_t last_use;
  Value value;
};

struct Cache {
  std::mutex mutex;
  std::unordered_map<Key, Entry, Hash> entries;
  uint64_t uses = 0;
};

Cache& cache() {
  static Cache* const cache = new Cache;  // never destroyed: its memory may outlive the device
  return *cache;
}

Value known(const Key& key, const void* data, int64_t version) {
  const std::lock_guard lock(cache().mutex);
  const auto at = cache().entries.find(key);
  if (at == cache().entries.end() || at->second.data != data || at->second.version != version) return nullptr;
  at->second.last_use = ++cache().uses;
  return at->second.value;
}

void keep(const Key& key, Entry entry) {
  std::vector<Value> dropped;  // freed without the lock
  const std::lock_guard lock(cache().mutex);
  auto& entries = cache().entries;
  for (auto at = entries.begin(); at != entries.end();)
    if (at->second.storage.expired() || at->first == key) {
      dropped.push_back(std::move(at->second.value));
      at = entries.erase(at);
    } else {
      ++at;
    }
  if (entries.size() >= kMostEntries) {
    auto oldest = entries.begin();
    for (auto at = entries.begin(); at != entries.end(); ++at)
      if (at->second.last_use < oldest->second.last_use) oldest = at;
    dropped.push_back(std::move(oldest->second.value));
    entries.erase(oldest);
  }
  entry.last_use = ++cache().uses;
  entries.emplace(key, std::move(entry));
}

}  // namespace

std::shared_ptr<const device::DeviceBuffers> find(const char* op, const char* argument, const at::Tensor& words,
                                                  int64_t parameter, Build build) {
  const auto stride = words.dim() == 1 ? words.stride(0) : 0;
  const Key key{words.storage().unsafeGetStorageImpl(), words.storage_offset(), words.numel(), stride, parameter};
  const bool has_version = !words.is_inference();
  const int64_t version = has_version ? words._version() : 0;
  Value value = has_version ? known(key, words.const_data_ptr(), version) : nullptr;
  if (!value) {
    PK_CHECK(!device::capturing(), op, argument,
             "a tensor whose numbers are known before the capture of a graph begins (run a step first)",
             "a new or changed one");
    device::release_forgotten();
    value = build(device::download(words));
    if (has_version) keep(key, {words.storage().getWeakStorageImpl(), words.const_data_ptr(), version, 0, value});
  }
  value->used_here();
  return value;
}

}  // namespace prunekernels::host_cache
