// Which plan is the fastest, found out on the calls themselves: each call runs one contender and tells its time. A
// contender that is clearly slower runs once or twice; those that are nearly as fast take turns until the best of their
// runs tell them apart, which costs next to nothing as they are nearly as fast.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "plan/plan.h"

namespace prunekernels {

// The best of the runs of a plan so far.
struct Trial {
  Plan plan;
  double ms = std::numeric_limits<double>::infinity();
  int32_t runs = 0;
  bool out = false;  // no longer a contender
};

class Trials {
 public:
  Trials() = default;
  // In the order in which they are to have their first runs: the one that is likely to be the fastest first.
  explicit Trials(const std::vector<Plan>& contenders);

  // What was found out before.
  explicit Trials(std::vector<Trial> trials) : trials_(std::move(trials)) {}

  // The contender whose turn it is.
  Plan next() const;
  void add(Plan plan, double ms);
  bool settled() const;
  // The fastest so far: dense, unless another one is faster by more than a tie; without any run, the first contender.
  Plan best() const;
  // How much longer than the best the second best takes, 0.5 = half as long again; infinite without a second one.
  double lead() const;
  // A plan's time over that of the best; NaN if it was not tried.
  double relative(Plan plan) const;
  // Whether any plan has run.
  bool begun() const;
  const std::vector<Trial>& all() const { return trials_; }

 private:
  double least() const;

  std::vector<Trial> trials_;
};

}  // namespace prunekernels
