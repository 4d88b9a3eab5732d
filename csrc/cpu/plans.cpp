#include "cpu/plans.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <mutex>
#include <vector>

namespace prunekernels {
namespace {

constexpr double kFarBehind = 3;       // times the model's best: not worth measuring
constexpr double kDenseFarBehind = 8;  // the promise is made against dense, and models err
constexpr double kHopeless = 2;        // times the best first run: not worth a second ...
constexpr double kShortMs = 5;         // ... unless it is short, where a first run is mostly set-up
constexpr double kTie = 0.97;          // dense wins unless another plan takes less than this share of its time
constexpr int kLeastRounds = 2, kMostRounds = 16;

// The plane kernels: floats, NCHW, offsets that fit 32 bits. A tensor dense in both formats is NCHW to them.
bool planes_serve(const ConvShape& s, at::ScalarType dtype, at::MemoryFormat format) {
  constexpr int64_t kMost = 1 << 30;
  return dtype == at::kFloat && format == at::MemoryFormat::Contiguous && s.C * s.in_pixels() < kMost &&
         s.K * s.out_pixels() < kMost;
}

bool serves(Plan plan, const PlanCase& c) { return plan_serves(plan, c.shape, c.dtype, c.format); }

double cost(Plan plan, const PlanCase& c) { return cost(plan, c.shape, c.mask, c.direction); }

Plan modelled(const PlanCase& c) {
  Plan best = Plan::dense;
  double least = almost_full(c.mask) ? 0 : cost(Plan::dense, c) * kMargin;
  for (Plan plan : kPlans)
    if (plan != Plan::dense && cost(plan, c) < least && serves(plan, c)) best = plan, least = cost(plan, c);
  return best;
}

bool may_measure(const PlanRequest& asked, const PlanCase& c) {
  return asked.may_measure && !almost_full(c.mask) && !at::globalContext().deterministicAlgorithms();
}

struct Trial {
  Plan plan;
  at::Tensor result;  // of the first run
  double ms;          // of the fastest run
};

std::vector<Trial> candidates(const PlanCase& c) {
  double least = std::numeric_limits<double>::infinity();
  for (Plan plan : kPlans)
    if (serves(plan, c)) least = std::min(least, cost(plan, c));
  std::vector<Trial> trials;
  for (Plan plan : kPlans)
    if (serves(plan, c) && cost(plan, c) <= (plan == Plan::dense ? kDenseFarBehind : kFarBehind) * least)
      trials.push_back({plan, {}, 0});
  return trials;
}

template <typename F>
double milliseconds(F f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

// Dense stays in whatever its first run took: the promise is made against it, and it pays for the vendor's start.
void time_each(std::vector<Trial>& trials, c10::function_ref<at::Tensor(Plan)> run) {
  double best = std::numeric_limits<double>::infinity(), spent = 0;
  for (Trial& t : trials) {
    t.ms = milliseconds([&] { t.result = run(t.plan); });
    best = std::min(best, t.ms);
  }
  const double hopeless = std::max(kShortMs, kHopeless * best);
  std::vector<Trial*> contenders;
  for (Trial& t : trials)
    if (t.plan == Plan::dense || t.ms <= hopeless) contenders.push_back(&t);
  for (int round = 0; round < kLeastRounds || (round < kMostRounds && spent < kShortMs); ++round)
    for (Trial* t : contenders) {
      const double ms = milliseconds([&] { run(t->plan); });
      t->ms = std::min(t->ms, ms), spent += ms;
    }
}

const Trial& fastest(const std::vector<Trial>& trials) {
  const auto handicapped = [](const Trial& t) { return t.plan == Plan::dense ? t.ms * kTie : t.ms; };
  return *std::min_element(trials.begin(), trials.end(),
                           [&](const Trial& a, const Trial& b) { return handicapped(a) < handicapped(b); });
}

at::Tensor measure(const PlanKey& key, std::vector<Trial> trials, c10::function_ref<at::Tensor(Plan)> run) {
  static std::mutex one_at_a_time;  // two that measure at once disturb each other
  const std::lock_guard lock(one_at_a_time);
  if (const auto known = plan_cache::find(key)) return run(*known);
  time_each(trials, run);
  const Trial& winner = fastest(trials);
  Measured measured{winner.plan, {}};
  measured.ms.fill(std::numeric_limits<double>::quiet_NaN());
  for (const Trial& t : trials) measured.ms[static_cast<int>(t.plan)] = t.ms;
  plan_cache::keep(key, measured);
  return winner.result;
}

}  // namespace

bool plan_serves(Plan plan, const ConvShape& shape, at::ScalarType dtype, at::MemoryFormat format) {
  if (plan == Plan::dense || plan == Plan::compact) return true;
  return planes_serve(shape, dtype, format);
}

PlanKey plan_key(const PlanCase& c) {
  const ConvShape& s = c.shape;
  const MaskTable& m = c.mask;
  const auto word = [](int64_t value) { return static_cast<int32_t>(value); };
  const auto sixteenths = [&](int64_t live, int64_t of) {
    return word((live * 16 + of - 1) / std::max<int64_t>(1, of));
  };
  PlanKey key{};
  key.direction = c.direction;
  key.dtype = word(static_cast<int64_t>(c.dtype)), key.format = word(static_cast<int64_t>(c.format));
  key.threads = at::get_num_threads();
  key.N = word(s.N), key.C = word(s.C), key.H = word(s.H), key.W = word(s.W);
  key.K = word(s.K), key.R = word(s.R), key.S = word(s.S), key.G = word(s.G);
  for (int i = 0; i < 2; ++i) {
    key.stride[i] = word(s.stride[i]);
    key.padding[i] = word(s.padding[i]);
    key.dilation[i] = word(s.dilation[i]);
  }
  key.live_filters = sixteenths(m.out_count(), s.K);
  key.live_inputs = sixteenths(m.in_count(), s.C);
  key.live_kernels = sixteenths(m[kLivePairs], m.out_count() * m[kInPerGroup]);
  return key;
}

Plan planned(const PlanRequest& asked, const PlanCase& c) {
  if (asked.forced && serves(*asked.forced, c)) return *asked.forced;
  if (may_measure(asked, c))
    if (const auto known = plan_cache::find(plan_key(c))) return *known;
  return modelled(c);
}

at::Tensor with_plan(const PlanRequest& asked, const PlanCase& c, c10::function_ref<at::Tensor(Plan)> run) {
  if (asked.forced && serves(*asked.forced, c)) return run(*asked.forced);
  if (!may_measure(asked, c)) return run(modelled(c));
  const PlanKey key = plan_key(c);
  if (const auto known = plan_cache::find(key)) return run(*known);
  std::vector<Trial> trials = candidates(c);
  if (trials.size() == 1 || plan_cache::full()) return run(modelled(c));
  return measure(key, std::move(trials), run);
}

}  // namespace prunekernels
