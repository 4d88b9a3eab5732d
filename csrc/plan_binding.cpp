// What module _C tells about plans: which one a problem would get, and what was measured.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

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

py::dict describe(const PlanKey& k, const Measured& measured) {
  const auto dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                  [&](const auto& d) { return static_cast<int32_t>(d.second) == k.dtype; });
  py::dict ms, row;
  for (Plan plan : kPlans) {
    const double time = measured.ms[static_cast<int>(plan)];
    if (!std::isnan(time)) ms[name_of(plan)] = time;
  }
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
  row["plan"] = name_of(measured.plan);
  row["ms"] = ms;
  return row;
}

// One dict for each problem that was measured.
std::vector<py::dict> plan_table() {
  std::vector<py::dict> rows;
  for (const auto& [key, measured] : plan_cache::entries()) rows.push_back(describe(key, measured));
  return rows;
}

}  // namespace

void bind_plans(py::module_& m) {
  m.def("choose_plan", choose_plan, py::arg("plan"), py::arg("direction"), py::arg("x_shape"), py::arg("weight_shape"),
        py::arg("table"), py::kw_only(), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
        py::arg("dtype"), py::arg("channels_last"), py::arg("device"),
        "The plan that one direction of one layer would get now. Measures nothing.");
  m.def("plan_table", plan_table, "What was measured: one row for each problem.");
  m.def("clear_plans", plan_cache::clear, "Forgets what was measured.");
}

}  // namespace prunekernels
