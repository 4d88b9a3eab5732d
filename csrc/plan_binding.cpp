// What module _C tells about plans: which one a problem would get, and what was measured.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels/pixel_kernels.h"
#include "cpu/plans_cpu.h"
#if defined(PRUNEKERNELS_WITH_CUDA)
#include "cuda/plans_cuda.h"
#endif

namespace py = pybind11;

namespace prunekernels {
namespace {

using Four = std::array<int64_t, 4>;
using Two = std::array<int64_t, 2>;
using Words = py::array_t<int32_t, py::array::c_style>;

constexpr std::pair<const char*, at::ScalarType> kDtypes[] = {
    {"float32", at::kFloat}, {"float64", at::kDouble}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}};

ConvShape shape_of(const Four& x, const Four& weight, const Two& stride, const Two& padding, const Two& dilation,
                   int64_t groups) {
  ConvShape s{};
  s.N = x[0], s.C = x[1], s.H = x[2], s.W = x[3];
  s.K = weight[0], s.R = weight[2], s.S = weight[3], s.G = groups;
  for (int i = 0; i < 2; ++i) s.stride[i] = stride[i], s.padding[i] = padding[i], s.dilation[i] = dilation[i];
  s.P = conv_out_size(s.H, s.R, s.stride[0], s.padding[0], s.dilation[0]);
  s.Q = conv_out_size(s.W, s.S, s.stride[1], s.padding[1], s.dilation[1]);
  return s;
}

template <typename Pairs>
auto find(const Pairs& pairs, const char* argument, const std::string& name) {
  for (const auto& [known, value] : pairs)
    if (name == known) return value;
  throw std::invalid_argument(std::string("choose_plan: ") + argument + ": expected one that plan.py offers, got " +
                              name);
}

Plan plan_on(const PlanRequest& asked, const MaskTable& mask, const int32_t* words, int64_t count, const ConvShape& s,
             Direction direction, at::ScalarType dtype, at::MemoryFormat format, const at::Device& device) {
  if (device.is_cpu()) return planned(cpu_plans(), asked, {s, mask, direction, dtype, format});
#if defined(PRUNEKERNELS_WITH_CUDA)
  return plan_on_device(asked, {words, words + count}, s, direction, dtype, format, device);
#else
  return Plan::dense;
#endif
}

// table: the words of a mask table, see core/mask_table.h.
std::string choose_plan(const std::string& plan, const std::string& direction, const Four& x_shape,
                        const Four& weight_shape, const Words& table, const Two& stride, const Two& padding,
                        const Two& dilation, int64_t groups, const std::string& dtype, bool channels_last,
                        const std::string& device) {
  constexpr std::pair<const char*, Direction> directions[] = {
      {"forward", Direction::forward}, {"grad_input", Direction::grad_input}, {"grad_weight", Direction::grad_weight}};
  const ConvShape s = shape_of(x_shape, weight_shape, stride, padding, dilation, groups);
  if (table.size() < kHeaderWords || table.size() != mask_table_words(s.K, s.C, s.G))
    throw std::invalid_argument("choose_plan: table: expected one for these shapes, got " +
                                std::to_string(table.size()));
  const MaskTable mask(table.data());
  const PlanRequest asked = read_plan("choose_plan", plan);
  if (asked.settled(mask) || mask[kLivePairs] == 0) return name_of(Plan::dense);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return name_of(plan_on(asked, mask, table.data(), table.size(), s, find(directions, "direction", direction),
                         find(kDtypes, "dtype", dtype), format, at::Device(device)));
}

py::dict describe(const PlanKey& k, const Known& known) {
  const auto dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                  [&](const auto& d) { return static_cast<int32_t>(d.second) == k.dtype; });
  py::dict ms, row;
  for (const Trial& t : known.trials.all())
    if (t.runs) ms[name_of(t.plan)] = t.ms;
  row["direction"] = name_of(k.direction);
  row["x_shape"] = py::make_tuple(k.N, k.C, k.H, k.W);
  row["weight_shape"] = py::make_tuple(k.K, k.C / k.G, k.R, k.S);
  row["stride"] = py::make_tuple(k.stride[0], k.stride[1]);
  row["padding"] = py::make_tuple(k.padding[0], k.padding[1]);
  row["dilation"] = py::make_tuple(k.dilation[0], k.dilation[1]);
  row["groups"] = k.G;
  row["channels_last"] = k.format == static_cast<int32_t>(at::MemoryFormat::ChannelsLast);
  row["dtype"] = dtype->first;
  row["live"] = py::make_tuple(k.live_filters, k.live_inputs, k.live_kernels);
  row["device"] =
      at::Device(static_cast<at::DeviceType>(k.device_type), static_cast<at::DeviceIndex>(k.device_index)).str();
  row["threads"] = k.threads;
  row["plan"] = name_of(known.plan);
  row["ms"] = ms;
  row["settled"] = known.settled;
  return row;
}

// One dict for each problem that was met.
std::vector<py::dict> plan_table() {
  std::vector<py::dict> rows;
  for (const auto& [key, known] : plan_cache::entries()) rows.push_back(describe(key, known));
  return rows;
}

Plan plan_of(const std::string& name) {
  for (Plan plan : kPlans)
    if (name == name_of(plan)) return plan;
  throw std::invalid_argument("expected a plan, got " + name);
}

// Entries of a file of plans: the key's words, the plan, and by plan that was tried its time and number of runs.
using KeyWords = std::array<int32_t, sizeof(PlanKey) / sizeof(int32_t)>;
using TrialEntry = std::tuple<std::string, double, int32_t>;
using PlanEntry = std::tuple<KeyWords, std::string, std::vector<TrialEntry>>;

// What trials have settled on the CPU: of a GPU the key does not say which one it is.
std::vector<PlanEntry> settled_plans() {
  std::vector<PlanEntry> found;
  for (const auto& [key, known] : plan_cache::entries()) {
    if (!known.settled || !known.trials.begun() || key.device_type != static_cast<int32_t>(at::kCPU)) continue;
    KeyWords words;
    std::memcpy(words.data(), &key, sizeof(key));
    std::vector<TrialEntry> trials;
    for (const Trial& t : known.trials.all())
      if (t.runs) trials.emplace_back(name_of(t.plan), t.ms, t.runs);
    found.emplace_back(words, name_of(known.plan), std::move(trials));
  }
  return found;
}

void restore_plans(const std::vector<PlanEntry>& entries) {
  std::vector<std::pair<PlanKey, Known>> read;
  for (const auto& [words, plan, tried] : entries) {
    std::vector<Trial> trials;
    for (const auto& [name, ms, runs] : tried) trials.push_back({plan_of(name), ms, runs, true});
    PlanKey key;
    std::memcpy(&key, words.data(), sizeof(key));
    read.push_back({key, {plan_of(plan), true, Trials(std::move(trials))}});
  }
  for (const auto& [key, known] : read) plan_cache::begin(key, known);
}

Trials trials_of(const std::vector<std::string>& names) {
  std::vector<Plan> plans;
  for (const std::string& name : names) plans.push_back(plan_of(name));
  return Trials(plans);
}

}  // namespace

void bind_plans(py::module_& m) {
  py::class_<Trials>(m, "PlanTrials", "How the plan of one problem is found out, without any convolution: for tests.")
      .def(py::init(&trials_of))
      .def("next", [](const Trials& t) { return name_of(t.next()); })
      .def("add", [](Trials& t, const std::string& plan, double ms) { t.add(plan_of(plan), ms); })
      .def("settled", &Trials::settled)
      .def("best", [](const Trials& t) { return name_of(t.best()); })
      .def("lead", &Trials::lead);
  m.def("choose_plan", choose_plan, py::arg("plan"), py::arg("direction"), py::arg("x_shape"), py::arg("weight_shape"),
        py::arg("table"), py::kw_only(), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
        py::arg("dtype"), py::arg("channels_last"), py::arg("device"),
        "The plan that one direction of one layer would get now. Measures nothing.");
  m.def("plan_table", plan_table, "What was found out: one row for each problem.");
  m.attr("plan_key_words") = std::tuple_size_v<KeyWords>;
  m.def("settled_plans", settled_plans, "What a file of plans keeps.");
  m.def("restore_plans", restore_plans, "Takes over what settled_plans() gave.");
  m.def("clear_plans", plan_cache::clear, "Forgets what was found out.");
  m.def("plan_trials", plan_cache::trials, "How many runs were timed.");
  m.def("has_pixel_kernels", has_pixel_kernels, "Whether this CPU has instructions for bfloat16 in channels_last.");
}

}  // namespace prunekernels
