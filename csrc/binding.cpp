// Module _C: importing it registers the operators; what it offers besides are facts about the build and about plans.
// No tensor passes through here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/plans_cpu.h"
#if defined(PRUNEKERNELS_WITH_CUDA)
#include "cuda/choose.h"
#endif

namespace py = pybind11;

namespace prunekernels {
namespace {

std::map<std::string, std::string> build_info() {
  return {
#if defined(__VERSION__)
      {"compiler", __VERSION__},
#endif
      {"torch", PRUNEKERNELS_TORCH_VERSION},
#if defined(PRUNEKERNELS_WITH_CUDA)
      {"cuda", PRUNEKERNELS_WITH_CUDA},
#else
      {"cuda", ""},
#endif
      {"isa", isa_name(isa())},
  };
}

#if defined(PRUNEKERNELS_WITH_CUDA)
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// CPU rows have the instruction set that they need, CUDA rows the oldest architecture; the latter are listed in every
// build, and compiled where there is CUDA.
std::vector<py::dict> kernels() {
  std::vector<py::dict> rows;
  const auto add = [&](const char* name, const char* operation, const char* device, const char* element,
                       const char* needs, const char* what, bool compiled) {
    py::dict row;
    row["name"] = name, row["operation"] = operation, row["device"] = device, row["element"] = element;
    row[needs] = what, row["compiled"] = compiled;
    rows.push_back(row);
  };
#define PK_CHANNEL_COPY(operation, element, isa) \
  add(#operation "_" #element "_" #isa, #operation, "cpu", #element, "isa", #isa, true);
#define PK_MICROKERNELS(isa) add("microkernels_" #isa, "microkernels", "cpu", "f32", "isa", #isa, true);
#define PK_OPTIM(isa) add("optim_" #isa, "optim", "cpu", "f32", "isa", #isa, true);
#define PK_MASK_GRAD(isa) add("mask_grad_" #isa, "mask_grad", "cpu", "f32", "isa", #isa, true);
#define PK_NORM(isa) add("norm_" #isa, "norm", "cpu", "f32", "isa", #isa, true);
#define PK_CUDA(operation, element, arch) \
  add(#operation "_" #element "_" #arch, #operation, "cuda", #element, "arch", #arch, kWithCuda);
#include "kernel_table.inc"
  return rows;
}

constexpr std::pair<const char*, at::ScalarType> kDtypes[] = {
    {"float32", at::kFloat}, {"float64", at::kDouble}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}};

// sizes: N C H W K R S G, stride, padding, dilation.
ConvShape shape_of(const std::vector<int64_t>& sizes) {
  if (sizes.size() != 14)
    throw std::invalid_argument("choose_plan: sizes: expected 14 integers, got " + std::to_string(sizes.size()));
  ConvShape s{};
  int64_t* const fields[] = {&s.N,          &s.C,          &s.H,           &s.W,          &s.K,
                             &s.R,          &s.S,          &s.G,           &s.stride[0],  &s.stride[1],
                             &s.padding[0], &s.padding[1], &s.dilation[0], &s.dilation[1]};
  for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
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

Plan plan_there(const PlanRequest& asked, const MaskTable& mask, const int32_t* words, int64_t count,
                const ConvShape& s, Direction direction, at::ScalarType dtype, at::MemoryFormat format,
                const at::Device& device) {
  if (device.is_cpu()) return planned(cpu_plans(), asked, {s, mask, direction, dtype, format});
#if defined(PRUNEKERNELS_WITH_CUDA)
  return plan_on_device(asked, {words, words + count}, s, direction, dtype, format, device);
#else
  return Plan::dense;
#endif
}

std::string choose_plan(const std::string& plan, const std::string& direction, const std::vector<int64_t>& sizes,
                        const py::array_t<int32_t, py::array::c_style>& table, const std::string& dtype,
                        bool channels_last, const std::string& device) {
  constexpr std::pair<const char*, Direction> directions[] = {
      {"forward", Direction::forward}, {"grad_input", Direction::grad_input}, {"grad_weight", Direction::grad_weight}};
  const ConvShape s = shape_of(sizes);
  if (table.size() < kHeaderWords || table.size() != mask_table_words(s.K, s.C, s.G))
    throw std::invalid_argument("choose_plan: table: expected one of these sizes, got " + std::to_string(table.size()));
  const MaskTable mask(table.data());
  const PlanRequest asked = read_plan("choose_plan", plan);
  if (asked.settled(mask) || mask[kLivePairs] == 0) return name_of(Plan::dense);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return name_of(plan_there(asked, mask, table.data(), table.size(), s, find(directions, "direction", direction),
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

std::vector<py::dict> plan_table() {
  std::vector<py::dict> rows;
  for (const auto& [key, measured] : plan_cache::entries()) rows.push_back(describe(key, measured));
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of prunekernels: registers torch.ops.prunekernels.*";
  m.def("build_info", build_info,
        "Compiler, torch version, CUDA version ('' without) and the CPU instruction set in force.");
  m.def("kernels", kernels, "The rows of the kernel table.");
  m.def("choose_plan", choose_plan, py::arg("plan"), py::arg("direction"), py::arg("sizes"), py::arg("table"),
        py::arg("dtype"), py::arg("channels_last"), py::arg("device"),
        "The plan that one direction of one layer would get now.");
  m.def("plan_table", plan_table, "What was measured, one row for each kind of problem.");
  m.def("clear_plans", plan_cache::clear, "Forgets what was measured.");
  m.def("cap_isa", cap_isa, py::arg("name"), "Caps the instruction set of the CPU kernels; '' lifts the cap.");
}

}  // namespace prunekernels
