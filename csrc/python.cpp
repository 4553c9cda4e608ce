// lora_ext._C: facts about this build, the texts of refusals, and the plans of CUDA calls, as Python objects. Includes
// no torch header. The ops are in libraries of their own, which need no Python (csrc/library.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../build/facts.h"  // written by setup.py
#include "cpu/isa.h"
#include "cuda/mma/tile_sizes.h"
#include "cuda/plan.h"
#include "refusals.h"

namespace py = pybind11;

namespace lora_ext {
namespace {

std::map<std::string, std::string> build_info() { return {LORA_EXT_BUILD_INFO{"compiler", __VERSION__}}; }

std::vector<std::string> dtypes() {
  std::vector<std::string> names;
  for (const DTypeFacts& facts : kDTypes) names.emplace_back(facts.name);
  return names;
}

std::string cpu_isa() {
  const auto isa = cpu::selected_isa();
  return isa ? cpu::isa_name(*isa) : "";
}

DType dtype_named(const std::string& name) {
  for (const DTypeFacts& facts : kDTypes) {
    if (name == facts.name) return facts.dtype;
  }
  throw py::value_error("there is no dtype " + name + ", want one of " LORA_EXT_DTYPE_NAMES);
}

int64_t few_tokens(const std::string& dtype) {
  return cpu::few_tokens(cpu::selected_isa().value_or(cpu::Isa::kGeneric), dtype_named(dtype));
}

std::string base_product() {
  const auto is_own = cpu::has_own_base_product();
  return !is_own ? "" : *is_own ? "own" : "library";
}

std::map<std::string, std::pair<std::string, std::string>> all_refusals() {
  std::map<std::string, std::pair<std::string, std::string>> texts;
  for (const refusals::Refusal& refusal : refusals::kAll) texts[refusal.name] = {refusal.error, refusal.text};
  return texts;
}

// --- plans ---

template <class... Parts>
std::string text(const char* format, const Parts&... parts) {
  return py::str(format).format(parts...);
}

std::string describe(const cuda::PassSplit& split) {
  return text("{} chunks of {} tokens x {} ranges of {} features", split.chunks, split.tokens_per_chunk, split.ranges,
              split.features_per_range);
}

// The blocks of a launch: "64 chunks of 128 tokens x 2 ranges of 2048 features".
std::string describe(const cuda::Plan& plan, const cuda::PlannedLaunch& launch) {
  using cuda::Kernel, cuda::Result;
  const cuda::GradYPass& grad_y = plan.grad_y[launch.sibling];
  switch (launch.kernel) {
    case Kernel::kShrink: return describe(launch.result == Result::kXa ? plan.xa : grad_y.ranks);
    case Kernel::kTokenSum: return describe(launch.result == Result::kGradLoraA ? plan.grad_A : grad_y.features);
    case Kernel::kShrinkAndSum: {
      std::string parts;
      for (const cuda::GradYPass& pass : plan.grad_y) {
        if (pass.fused) parts += (parts.empty() ? "" : "; ") + describe(pass.ranks);
      }
      return parts;
    }
    case Kernel::kFewTokens: return text("the base layers, too: {} rows of a weight in a block", 16 * plan.row_tiles);
    case Kernel::kExpandShort: {
      const cuda::ExpandSplit& split = launch.result == Result::kY ? plan.y : plan.grad_x;
      return text("{} rows x up to {} columns{}", split.row_warps * cuda::mma::kPieceRows,
                  *std::max_element(split.tile_cols.begin(), split.tile_cols.end()),
                  split.adds_partials ? ", adds partial sums" : "");
    }
    case Kernel::kExpandLong: return text("{} rows x up to {} columns", cuda::mma::kLongRows, cuda::mma::kLongCols);
    case Kernel::kFewRowsShrink:
    case Kernel::kGroupedShrink: return text("{} ranges of {} features", plan.xa.ranges, plan.xa.features_per_range);
    default: return "";
  }
}

struct Launch : cuda::PlannedLaunch {
  std::string detail;

  const char* kernel_name() const { return cuda::kKernelNames[static_cast<int>(kernel)]; }
  const char* result_name() const { return cuda::kResultNames[static_cast<int>(result)]; }
  std::pair<int64_t, int64_t> grid() const { return {grid_x, grid_y}; }
  int64_t blocks() const { return grid_x * grid_y; }
  std::string line() const {
    const std::string name = variant > 0 ? text("{}<{}>", kernel_name(), variant) : kernel_name();
    const std::string size = grid_y == 1 ? text("{}", grid_x) : text("{} x {}", grid_x, grid_y);
    return text("{:<19} {:<11} {:>11} blocks of {} threads", name, result_name(), size, threads) +
           (shared_bytes > 0 ? text(", {:6} bytes shared", shared_bytes) : "") + (detail.empty() ? "" : "; " + detail);
  }
};

struct Plan {
  std::string title;
  int sms;
  int64_t scratch_bytes;
  bool streams_weights;
  std::vector<Launch> launches;

  // call: what a plan is made of.
  template <class Call>
  Plan(std::string plan_title, const Call& call, int plan_sms) : title(std::move(plan_title)), sms(plan_sms) {
    const cuda::Plan plan = cuda::make_plan(call, {sms});
    scratch_bytes = plan.scratch.bytes;
    streams_weights = plan.streams_weights;
    for (const cuda::PlannedLaunch& launch : plan.launches) launches.push_back({launch, describe(plan, launch)});
  }
  std::string lines() const {
    std::string lines =
        text("{}\n{} launches on {} SMs, {} bytes of scratch memory", title, launches.size(), sms, scratch_bytes);
    for (const Launch& launch : launches) lines += "\n  " + launch.line();
    return lines;
  }
};

// Siblings: (out_features, rank) of every layer that reads x.
using Layers = std::vector<std::pair<int64_t, int64_t>>;

// The fields that the parameters of all kernels have. Addresses are null: they are aligned.
template <class Params>
void set_sizes(Params& p, int64_t num_tokens, const Layers& layers, const std::string& dtype,
               const std::string& factor_dtype) {
  p.num_tokens = num_tokens;
  p.num_siblings = static_cast<int>(layers.size());
  p.dtype = dtype_named(dtype);
  p.factor_dtype = dtype_named(factor_dtype);
  int64_t begin = 0;
  for (size_t s = 0; s < layers.size(); ++s) {
    p.siblings[s].rank = layers[s].second;
    p.siblings[s].rank_begin = begin;
    if constexpr (requires { p.siblings[s].out_features; }) p.siblings[s].out_features = layers[s].first;
    begin += layers[s].second;
  }
  p.total_rank = begin;
}

void check(int64_t num_tokens, int64_t in_features, const Layers& layers, const std::string& dtype, int sms) {
  if (num_tokens < 0 || in_features < 0) throw py::value_error("plan: a size is negative");
  if (layers.empty() || layers.size() > kMaxSiblings) {
    throw py::value_error("plan: there are " + std::to_string(layers.size()) + " layers, want 1 to " +
                          std::to_string(kMaxSiblings));
  }
  for (const auto& [out_features, rank] : layers) {
    if (out_features < 0 || rank < 1)
      throw py::value_error("plan: want layers of (out_features, rank), rank at least 1");
  }
  if (!is_16_bit(dtype_named(dtype))) {
    throw py::value_error("plan: x has dtype " + dtype + ", but CUDA kernels take dtypes of 16 bits");
  }
  if (sms < 1) throw py::value_error("plan: a GPU has at least one SM");
}

// p: of a forward or a backward; `call` makes the call of it, when its sizes are set.
template <class Params, class MakeCall>
Plan plan_layers(const char* what, Params& p, int64_t num_tokens, int64_t in_features, const Layers& layers,
                 const std::string& dtype, const std::string& factor_dtype, int sms, const MakeCall& call) {
  check(num_tokens, in_features, layers, dtype, sms);
  set_sizes(p.shrink, num_tokens, layers, dtype, factor_dtype);
  set_sizes(p.expand, num_tokens, layers, dtype, factor_dtype);
  p.shrink.in_features = p.shrink.x_stride = in_features;
  std::string sizes;
  for (const auto& [out_features, rank] : layers) {
    sizes += text("{}{} (rank {})", sizes.empty() ? "" : ", ", out_features, rank);
  }
  const std::string title =
      text("{} of {} tokens, {} -> {}, {}, factors {}", what, num_tokens, in_features, sizes, dtype, factor_dtype);
  return {title, call(), sms};
}

Plan plan_forward(int64_t num_tokens, int64_t in_features, const Layers& layers, const std::string& dtype,
                  const std::string& factor_dtype, bool dropout, bool base_layers, int sms) {
  LoraForwardParams p{};
  p.shrink.threshold = dropout ? 1 : 0;
  BaseWeights weights;
  std::fill(std::begin(weights.strides), std::end(weights.strides), in_features);
  std::fill(std::begin(weights.column_strides), std::end(weights.column_strides), 1);
  return plan_layers("forward", p, num_tokens, in_features, layers, dtype, factor_dtype, sms,
                     [&] { return cuda::LoraCall(p, base_layers ? &weights : nullptr); });
}

Plan plan_backward(int64_t num_tokens, int64_t in_features, const Layers& layers, const std::string& dtype,
                   const std::string& factor_dtype, bool dropout, const std::array<bool, 3>& output_mask, int sms) {
  LoraBackwardParams p{};
  p.shrink.has_dropout = dropout;
  p.shrink.wants_grad_x = output_mask[0];
  p.shrink.wants_grad_lora_A = output_mask[1];
  p.expand.wants_grad_lora_B = output_mask[2];
  p.expand.wants_grad_xa = output_mask[0] || output_mask[1];
  return plan_layers("backward", p, num_tokens, in_features, layers, dtype, factor_dtype, sms,
                     [&] { return cuda::LoraCall(p); });
}

// Rows that choose among the groups of one stack of factors.
Plan plan_grouped(int64_t num_tokens, int64_t in_features, int64_t out_features, int64_t groups, int64_t rank,
                  bool backward, const std::string& dtype, const std::string& factor_dtype, bool dropout, int sms) {
  check(num_tokens, in_features, {{out_features, rank}}, dtype, sms);
  if (groups < 0) throw py::value_error("plan: a size is negative");
  const GroupedRows rows{.num_tokens = num_tokens,
                         .num_groups = groups,
                         .num_entries = num_tokens,
                         .rows_per_entry = 1,
                         .group_of_row = nullptr,
                         .scalings = nullptr,
                         .ranks = nullptr,
                         .rescale = 1.0};
  GroupedEntry stack{};
  stack.rank = rank;
  stack.wants_grad_A = stack.wants_grad_B = backward;
  const auto finish = [&](auto p) {
    p.in_features = in_features;
    p.out_features = out_features;
    p.max_rank = rank;
    p.dtype = dtype_named(dtype);
    p.factor_dtype = dtype_named(factor_dtype);
    const std::string title = text("grouped {} of {} rows, {} -> {} (rank up to {}), {} groups, {}, factors {}",
                                   backward ? "backward" : "forward", num_tokens, in_features, out_features, rank,
                                   groups, dtype, factor_dtype);
    return Plan(title, cuda::GroupedCall(p, rows, {&stack, 1}), sms);
  };
  LoraGroupedForwardParams forward_params{};
  forward_params.threshold = dropout ? 1 : 0;
  LoraGroupedBackwardParams backward_params{};
  backward_params.wants_grad_x = true;
  backward_params.has_dropout = dropout;
  return backward ? finish(backward_params) : finish(forward_params);
}

}  // namespace
}  // namespace lora_ext

PYBIND11_MODULE(_C, m) {
  using namespace lora_ext;
  using namespace py::literals;
  m.doc() = "Facts about the compiled part of lora_ext, and the plans of its CUDA kernels. Needs no torch and no GPU.";
  m.def("build_info", &build_info, "How the binary was built. Values are empty where they do not apply.");
  m.def("dtypes", &dtypes, "The names of the dtypes that the ops take.");
  m.def("cpu_isa", &cpu_isa, "The instruction set whose CPU kernels run here; \"\" if LORA_EXT_CPU_ISA names none.");
  m.def("available_cpu_isas", &cpu::available_isas, "The instruction sets that this machine can run, best first.");
  m.def("few_tokens", &few_tokens, "dtype"_a,
        "The most tokens of a dtype that the CPU kernel which reads a frozen weight once multiplies.");
  m.def(
      "base_product", &base_product,
      "Who computes base products of many tokens, \"own\" or \"library\"; \"\" if LORA_EXT_BASE_PRODUCT says neither.");
  m.def("refusals", &all_refusals, "name -> (exception, text), of csrc/refusals.h; {} stands for a part.");

  py::class_<Launch>(m, "Launch", "One launch of a plan.")
      .def_property_readonly("kernel", &Launch::kernel_name, "The kernel's name.")
      .def_readonly("variant", &Launch::variant, "Its size: ranks of a block, or tiles; 0: it has one.")
      .def_property_readonly("result", &Launch::result_name, "The result that it computes: xa, y, grad_xa, ...")
      .def_property_readonly("grid", &Launch::grid, "Blocks along x and y.")
      .def_property_readonly("blocks", &Launch::blocks, "All blocks.")
      .def_readonly("threads", &Launch::threads, "Threads of a block.")
      .def_readonly("shared_bytes", &Launch::shared_bytes, "Dynamic shared memory of a block.")
      .def_readonly("detail", &Launch::detail, "How the launch is divided into blocks.")
      .def("__repr__", &Launch::line);
  py::class_<Plan>(m, "Plan", "The launches of a call on CUDA (csrc/cuda/plan.h).")
      .def_readonly("launches", &Plan::launches, "In order.")
      .def_readonly("scratch_bytes", &Plan::scratch_bytes, "Scratch memory of the call.")
      .def_readonly("streams_weights", &Plan::streams_weights, "The launches compute the base layers, too.")
      .def("__repr__", &Plan::lines);

  const int h100 = cuda::Gpu{}.sms;
  m.def("plan_forward", &plan_forward, "num_tokens"_a, "in_features"_a, "layers"_a, py::kw_only(),
        "dtype"_a = "bfloat16", "factor_dtype"_a = "float32", "dropout"_a = true, "base_layers"_a = true,
        "sms"_a = h100,
        "The plan of a forward of layers, a list of (out_features, rank), that read one x. base_layers: with the\n"
        "products by the frozen weights, which a kernel for few tokens can compute, too.");
  m.def("plan_backward", &plan_backward, "num_tokens"_a, "in_features"_a, "layers"_a, py::kw_only(),
        "dtype"_a = "bfloat16", "factor_dtype"_a = "float32", "dropout"_a = true,
        "output_mask"_a = std::array{true, true, true}, "sms"_a = h100,
        "The plan of a backward. output_mask: whether grad_x, the grad_lora_A and the grad_lora_B are wanted.");
  m.def("plan_grouped", &plan_grouped, "num_tokens"_a, "in_features"_a, "out_features"_a, "groups"_a, "rank"_a,
        py::kw_only(), "backward"_a = false, "dtype"_a = "bfloat16", "factor_dtype"_a = "float32", "dropout"_a = false,
        "sms"_a = h100,
        "The plan of lora_grouped_ or of its backward, for rows that choose among the groups of one stack.");
}
