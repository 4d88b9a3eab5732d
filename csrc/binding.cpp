// Module _C: importing it registers the operators; what it offers besides are facts about the build. No tensor passes
// through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/mask_table.h"
#include "core/plan.h"
#include "cpu/isa.h"

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

std::vector<std::map<std::string, std::string>> kernels() {
  return {
#define PK_CHANNEL_COPY(operation, element, isa) \
  {{"name", #operation "_" #element "_" #isa},   \
   {"operation", #operation},                    \
   {"device", "cpu"},                            \
   {"element", #element},                        \
   {"isa", #isa}},
#include "kernel_table.inc"
#undef PK_CHANNEL_COPY
  };
}

// sizes: N C H W K R S P Q G; header: the first kHeaderWords of a mask table.
std::string choose_plan(const std::string& direction, const std::vector<int64_t>& sizes,
                        const std::vector<int32_t>& header) {
  if (sizes.size() != 10 || header.size() != kHeaderWords)
    throw std::invalid_argument("choose_plan: sizes, header: expected 10 and 16 integers, got " +
                                std::to_string(sizes.size()) + " and " + std::to_string(header.size()));
  ConvShape s{};
  int64_t* const fields[] = {&s.N, &s.C, &s.H, &s.W, &s.K, &s.R, &s.S, &s.P, &s.Q, &s.G};
  for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
  const Direction towards = direction == "forward"      ? Direction::forward
                            : direction == "grad_input" ? Direction::grad_input
                                                        : Direction::grad_weight;
  const MaskTable mask(header.data());
  return mask.nothing_dead() || !compact_pays(s, mask, towards) ? "dense" : "compact";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of prunekernels: registers torch.ops.prunekernels.*";
  m.def("build_info", build_info,
        "Compiler, torch version, CUDA version ('' without) and the CPU instruction set in force.");
  m.def("kernels", kernels, "The rows of the kernel table.");
  m.def("choose_plan", choose_plan, py::arg("direction"), py::arg("sizes"), py::arg("header"),
        "The cost model's plan for one direction of one layer.");
  m.def("cap_isa", cap_isa, py::arg("name"), "Caps the instruction set of the CPU kernels; '' lifts the cap.");
}

}  // namespace prunekernels
