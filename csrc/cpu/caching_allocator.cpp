#include "cpu/caching_allocator.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace prunekernels {
namespace {

constexpr size_t kKeepFrom = 1 << 20;  // smaller blocks are recycled well enough by the system's allocator
constexpr uint64_t kPatience = 1024;   // a cached block is freed after so many requests that it did not serve

// New pages come as huge ones where the system offers them: 26 MB cost 1.6 ms to take then, against 8.7.
void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kKeepFrom) return;
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: refusal changes nothing
#endif
}

class CachingAllocator final : public c10::Allocator {
 public:
  static CachingAllocator& get() {
    static auto* const allocator = new CachingAllocator;  // never destroyed: tensors may outlive every static
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    Block* block = take(bytes);
    if (!block) {
      block = new Block{c10::alloc_cpu(bytes), bytes, 0};
      advise_huge_pages(block->data, bytes);
    }
    c10::reportMemoryUsageToProfiler(block->data, static_cast<int64_t>(block->bytes), 0, 0, c10::kCPU);
    return {block->data, block, &release, c10::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  struct Block {
    void* data;
    size_t bytes;
    uint64_t cached_at;  // the request count then
  };

  CachingAllocator() {
    const char* text = std::getenv("PRUNEKERNELS_KEEP_MB");
    const std::string megabytes = text && *text ? text : "1024";
    TORCH_CHECK_VALUE(megabytes.size() < 10 && megabytes.find_first_not_of("0123456789") == std::string::npos,
                      "PRUNEKERNELS_KEEP_MB: expected a number of megabytes, got ", megabytes);
    limit_ = std::stoull(megabytes) << 20;
  }

  Block* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    ++requests_;
    auto best = cached_.end();
    for (auto it = cached_.begin(); it != cached_.end(); ++it) {
      const bool fits = (*it)->bytes >= bytes && (*it)->bytes <= bytes + bytes / 4;
      if (fits && (best == cached_.end() || (*it)->bytes <= (*best)->bytes)) best = it;  // of equals the warmest
    }
    Block* block = nullptr;
    if (best != cached_.end()) {
      block = *best;
      cached_bytes_ -= block->bytes;
      cached_.erase(best);
    }
    while (!cached_.empty() && cached_.front()->cached_at + kPatience < requests_) drop_oldest();
    return block;
  }

  void put_back(Block* block) {
    const std::lock_guard lock(mutex_);
    block->cached_at = requests_;
    cached_.push_back(block);
    cached_bytes_ += block->bytes;
    while (cached_bytes_ > limit_) drop_oldest();
  }

  void drop_oldest() {
    Block* block = cached_.front();
    cached_.pop_front();
    cached_bytes_ -= block->bytes;
    c10::free_cpu(block->data);
    delete block;
  }

  static void release(void* context) {
    Block* block = static_cast<Block*>(context);
    c10::reportMemoryUsageToProfiler(block->data, -static_cast<int64_t>(block->bytes), 0, 0, c10::kCPU);
    get().put_back(block);
  }

  std::mutex mutex_;
  std::list<Block*> cached_;  // oldest first
  size_t cached_bytes_ = 0, limit_;
  uint64_t requests_ = 0;
};

}  // namespace

at::Tensor empty_cached(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  const c10::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : sizes) bytes *= size;
  // In deterministic mode at::empty fills memory with NaN, so that elements which were never written show.
  if (bytes < kKeepFrom || at::globalContext().deterministicAlgorithms())
    return at::empty(sizes, options.memory_format(format));
  constexpr c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  return at::Tensor(at::detail::empty_generic(sizes, &CachingAllocator::get(), cpu, dtype, format));
}

}  // namespace prunekernels
