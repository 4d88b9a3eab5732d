// Found before torch's own header in a build for ThreadSanitizer: at::parallel_for starts plain threads. It cannot see
// how OpenMP's runtime makes threads wait, so every loop that they share would look like a race.
#pragma once

#include <cstdint>

#define INTRA_OP_PARALLEL
namespace at::internal {
template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f);
}
#include_next <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

namespace at::internal {

// As torch's own: as many even pieces as there are threads, none smaller than the grain. The first is the caller's.
template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  const int64_t fit = grain_size > 0 ? divup(end - begin, grain_size) : end - begin;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), fit), piece = divup(end - begin, threads);
  std::vector<std::exception_ptr> errors(threads);
  auto share = [&](int64_t thread) {
    const int64_t first = begin + thread * piece;
    if (first >= end) return;
    try {
      const ThreadIdGuard guard(static_cast<int>(thread));
      f(first, std::min(end, first + piece));
    } catch (...) {
      errors[thread] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(share, thread);
  share(0);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace at::internal
