// lora_ext._C: facts about this build, the texts of refusals, and the plans of CUDA calls, as Python objects. Includes
// no torch header, and of Python only the stable ABI (setup.py defines Py_LIMITED_API), so that one binary serves every
// Python. The ops are in libraries of their own, which need no Python (csrc/library.cpp).
#include <Python.h>

#include <algorithm>
#include <array>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../build/facts.h"  // written by setup.py
#include "common/few_tokens.h"
#include "cpu/isa.h"
#include "cuda/plan.h"
#include "refusals.h"

namespace lora_ext {
namespace {

std::map<std::string, std::string> build_info() { return {LORA_EXT_BUILD_INFO{"compiler", __VERSION__}}; }

std::vector<std::string> dtypes() {
  std::vector<std::string> names;
  for (const DTypeFacts& facts : kDTypes) names.emplace_back(facts.name);
  return names;
}

std::string cpu_isa() {
  cpu::Isa isa;
  return cpu::select_isa(&isa) ? cpu::isa_name(isa) : "";
}

std::vector<std::string> available_cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::kBestFirst) {
    if (cpu::runs_here(isa)) names.emplace_back(cpu::isa_name(isa));
  }
  return names;
}

std::string base_product() {
  bool is_own;
  return !cpu::select_base_product(&is_own) ? "" : is_own ? "own" : "library";
}

std::map<std::string, std::pair<std::string, std::string>> all_refusals() {
  std::map<std::string, std::pair<std::string, std::string>> texts;
  for (const refusals::Refusal* refusal : refusals::kAll) texts[refusal->name] = {refusal->error, refusal->text};
  return texts;
}

// --- plans ---

struct Launch {
  std::string kernel, result, detail;
  int64_t variant, threads;
  std::pair<int64_t, int64_t> grid;
  int64_t shared_bytes;
};

struct Plan {
  std::vector<Launch> launches;
  int64_t scratch_bytes;
  bool streams_weights;
  std::string text;
};

DType dtype_named(const std::string& name) {
  for (const DTypeFacts& facts : kDTypes) {
    if (name == facts.name) return facts.dtype;
  }
  throw std::invalid_argument("plan: there is no dtype " + name + ", want one of " LORA_EXT_DTYPE_NAMES);
}

template <class PlanType>
std::vector<Launch> list_launches(const PlanType& plan, std::span<const cuda::PlannedLaunch> launches) {
  std::vector<Launch> list;
  for (const cuda::PlannedLaunch& launch : launches) {
    list.push_back({cuda::name_of(launch.kernel),
                    cuda::name_of(launch.result),
                    cuda::describe(plan, launch),
                    launch.variant,
                    launch.threads,
                    {launch.grid_x, launch.grid_y},
                    launch.shared_bytes});
  }
  return list;
}

Plan finished_plan(const cuda::LoraCall& call, const cuda::Gpu& gpu) {
  const cuda::Plan plan = cuda::make_plan(call, gpu);
  return {list_launches(plan, plan.launches()), plan.scratch.bytes, plan.streams_weights,
          cuda::to_string(call, plan, gpu)};
}

Plan finished_plan(const cuda::GroupedCall& call, const cuda::Gpu& gpu) {
  const cuda::GroupedPlan plan = cuda::make_plan(call, gpu);
  return {list_launches(plan, plan.launches), plan.scratch_bytes, false, cuda::to_string(call, plan, gpu)};
}

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

void check(int64_t num_tokens, int64_t in_features, const Layers& layers, const std::string& dtype,
           int multiprocessors) {
  if (num_tokens < 0 || in_features < 0) throw std::invalid_argument("plan: a size is negative");
  if (layers.empty() || layers.size() > kMaxSiblings) {
    throw std::invalid_argument("plan: there are " + std::to_string(layers.size()) + " layers, want 1 to " +
                                std::to_string(kMaxSiblings));
  }
  for (const auto& [out_features, rank] : layers) {
    if (out_features < 0 || rank < 1)
      throw std::invalid_argument("plan: want layers of (out_features, rank), rank at least 1");
  }
  if (!is_16_bit(dtype_named(dtype))) {
    throw std::invalid_argument("plan: x has dtype " + dtype + ", but CUDA kernels take dtypes of 16 bits");
  }
  if (multiprocessors < 1) throw std::invalid_argument("plan: a GPU has at least one multiprocessor");
}

Plan plan_forward(int64_t num_tokens, int64_t in_features, const Layers& layers, const std::string& dtype,
                  const std::string& factor_dtype, bool dropout, bool base_layers, int multiprocessors) {
  check(num_tokens, in_features, layers, dtype, multiprocessors);
  LoraForwardParams p{};
  set_sizes(p.shrink, num_tokens, layers, dtype, factor_dtype);
  set_sizes(p.expand, num_tokens, layers, dtype, factor_dtype);
  p.shrink.in_features = p.shrink.x_stride = in_features;
  p.shrink.threshold = dropout ? 1 : 0;
  BaseWeights weights;
  std::fill(std::begin(weights.strides), std::end(weights.strides), in_features);
  return finished_plan({p, base_layers ? &weights : nullptr}, {multiprocessors});
}

Plan plan_backward(int64_t num_tokens, int64_t in_features, const Layers& layers, const std::string& dtype,
                   const std::string& factor_dtype, bool dropout, const std::array<bool, 3>& output_mask,
                   int multiprocessors) {
  check(num_tokens, in_features, layers, dtype, multiprocessors);
  LoraBackwardParams p{};
  set_sizes(p.expand, num_tokens, layers, dtype, factor_dtype);
  set_sizes(p.shrink, num_tokens, layers, dtype, factor_dtype);
  p.shrink.in_features = p.shrink.x_stride = in_features;
  p.shrink.has_dropout = dropout;
  p.shrink.wants_grad_x = output_mask[0];
  p.shrink.wants_grad_lora_A = output_mask[1];
  p.expand.wants_grad_lora_B = output_mask[2];
  p.expand.wants_grad_xa = output_mask[0] || output_mask[1];
  return finished_plan(p, {multiprocessors});
}

// Rows that choose among the groups of one stack of factors.
Plan plan_grouped(int64_t num_tokens, int64_t in_features, int64_t out_features, int64_t groups, int64_t rank,
                  bool backward, const std::string& dtype, const std::string& factor_dtype, bool dropout,
                  int multiprocessors) {
  check(num_tokens, in_features, {{out_features, rank}}, dtype, multiprocessors);
  if (groups < 0) throw std::invalid_argument("plan: a size is negative");
  const cuda::GroupedRows rows{.num_tokens = num_tokens,
                               .num_groups = groups,
                               .num_entries = num_tokens,
                               .rows_per_entry = 1,
                               .group_of_row = nullptr,
                               .scalings = nullptr,
                               .ranks = nullptr,
                               .rescale = 1.0,
                               .has_ranks = false};
  cuda::GroupedEntry stack{};
  stack.rank = rank;
  stack.wants_grad_A = stack.wants_grad_B = backward;
  const auto finish = [&](auto p) {
    p.in_features = in_features;
    p.out_features = out_features;
    p.max_rank = rank;
    p.dtype = dtype_named(dtype);
    p.factor_dtype = dtype_named(factor_dtype);
    return finished_plan(cuda::GroupedCall(p, rows, {&stack, 1}), {multiprocessors});
  };
  LoraGroupedForwardParams forward_params{};
  forward_params.threshold = dropout ? 1 : 0;
  LoraGroupedBackwardParams backward_params{};
  backward_params.wants_grad_x = true;
  backward_params.has_dropout = dropout;
  return backward ? finish(backward_params) : finish(forward_params);
}

// --- C++ and Python ---

// The error of Python's that a failed call has set.
struct PythonError {};

// Returns what a call of Python's returned; a null means that it has set an error.
PyObject* checked(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return object;
}

// The types of Launch and Plan, which init() makes.
PyTypeObject* launch_type = nullptr;
PyTypeObject* plan_type = nullptr;

PyObject* to_python(bool value) { return checked(PyBool_FromLong(value)); }
PyObject* to_python(int64_t value) { return checked(PyLong_FromLongLong(value)); }
PyObject* to_python(const std::string& text) {
  return checked(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}
PyObject* to_python(const Launch& launch);
PyObject* to_python(const Plan& plan);

template <class First, class Second>
PyObject* to_python(const std::pair<First, Second>& pair) {
  return checked(Py_BuildValue("(NN)", to_python(pair.first), to_python(pair.second)));
}

template <class Element>
PyObject* to_python(const std::vector<Element>& elements) {
  PyObject* list = checked(PyList_New(static_cast<Py_ssize_t>(elements.size())));
  for (size_t i = 0; i < elements.size(); ++i) PyList_SetItem(list, static_cast<Py_ssize_t>(i), to_python(elements[i]));
  return list;
}

template <class Value>
PyObject* to_python(const std::map<std::string, Value>& map) {
  PyObject* dict = checked(PyDict_New());
  for (const auto& [key, value] : map) {
    PyObject* object = to_python(value);
    PyDict_SetItemString(dict, key.c_str(), object);
    Py_DECREF(object);
  }
  return dict;
}

// A named tuple of the fields, in the type's order.
template <class... Fields>
PyObject* named_tuple(PyTypeObject* type, const Fields&... fields) {
  PyObject* tuple = checked(PyStructSequence_New(type));
  Py_ssize_t i = 0;
  (PyStructSequence_SetItem(tuple, i++, to_python(fields)), ...);
  return tuple;
}

PyObject* to_python(const Launch& launch) {
  return named_tuple(launch_type, launch.kernel, launch.variant, launch.result, launch.grid,
                     launch.grid.first * launch.grid.second, launch.threads, launch.shared_bytes, launch.detail);
}

PyObject* to_python(const Plan& plan) {
  return named_tuple(plan_type, plan.launches, plan.scratch_bytes, plan.streams_weights, plan.text);
}

template <class Function>
void for_each(PyObject* sequence, Function&& function) {
  const Py_ssize_t size = PySequence_Size(sequence);
  if (size < 0) throw PythonError();
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* item = checked(PySequence_GetItem(sequence, i));
    function(item);
    Py_DECREF(item);
  }
}

Layers layers_of(PyObject* sequence) {
  Layers layers;
  for_each(sequence, [&](PyObject* layer) {
    std::vector<int64_t> sizes;
    for_each(layer, [&](PyObject* size) { sizes.push_back(PyLong_AsLongLong(size)); });
    if (PyErr_Occurred()) throw PythonError();
    if (sizes.size() != 2) throw std::invalid_argument("plan: want layers of (out_features, rank)");
    layers.emplace_back(sizes[0], sizes[1]);
  });
  return layers;
}

// Stores the arguments of a call; `format` and `names` are those of PyArg_ParseTupleAndKeywords.
template <class... Values>
void parse(PyObject* arguments, PyObject* keywords, const char* format, std::vector<const char*> names,
           Values*... values) {
  names.push_back(nullptr);
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, format, const_cast<char**>(names.data()), values...)) {
    throw PythonError();
  }
}

// The arguments of plans that have defaults.
struct Options {
  const char* dtype = "bfloat16";
  const char* factor_dtype = "float32";
  int dropout = 1;
  int multiprocessors = cuda::Gpu{}.multiprocessors;
};

PyObject* call_plan_forward(PyObject* arguments, PyObject* keywords) {
  long long num_tokens, in_features;
  PyObject* layers;
  Options o;
  int base_layers = 1;
  parse(arguments, keywords, "LLO|$ssppi:plan_forward",
        {"num_tokens", "in_features", "layers", "dtype", "factor_dtype", "dropout", "base_layers", "multiprocessors"},
        &num_tokens, &in_features, &layers, &o.dtype, &o.factor_dtype, &o.dropout, &base_layers, &o.multiprocessors);
  return to_python(plan_forward(num_tokens, in_features, layers_of(layers), o.dtype, o.factor_dtype, o.dropout,
                                base_layers, o.multiprocessors));
}

PyObject* call_plan_backward(PyObject* arguments, PyObject* keywords) {
  long long num_tokens, in_features;
  PyObject* layers;
  Options o;
  int x = 1, lora_A = 1, lora_B = 1;
  parse(arguments, keywords, "LLO|$ssp(ppp)i:plan_backward",
        {"num_tokens", "in_features", "layers", "dtype", "factor_dtype", "dropout", "output_mask", "multiprocessors"},
        &num_tokens, &in_features, &layers, &o.dtype, &o.factor_dtype, &o.dropout, &x, &lora_A, &lora_B,
        &o.multiprocessors);
  return to_python(plan_backward(num_tokens, in_features, layers_of(layers), o.dtype, o.factor_dtype, o.dropout,
                                 {x != 0, lora_A != 0, lora_B != 0}, o.multiprocessors));
}

PyObject* call_plan_grouped(PyObject* arguments, PyObject* keywords) {
  long long num_tokens, in_features, out_features, groups, rank;
  Options o;
  int backward = 0;
  o.dropout = 0;
  parse(arguments, keywords, "LLLLL|$psspi:plan_grouped",
        {"num_tokens", "in_features", "out_features", "groups", "rank", "backward", "dtype", "factor_dtype", "dropout",
         "multiprocessors"},
        &num_tokens, &in_features, &out_features, &groups, &rank, &backward, &o.dtype, &o.factor_dtype, &o.dropout,
        &o.multiprocessors);
  return to_python(plan_grouped(num_tokens, in_features, out_features, groups, rank, backward, o.dtype, o.factor_dtype,
                                o.dropout, o.multiprocessors));
}

PyObject* call_streams_weight(PyObject* arguments, PyObject* keywords) {
  long long num_tokens, in_features, rank;
  parse(arguments, keywords, "LLL:streams_weight", {"num_tokens", "in_features", "rank"}, &num_tokens, &in_features,
        &rank);
  return to_python(streams_weight(num_tokens, in_features, rank));
}

// Calls a function that takes Python's arguments, and sets the error that it throws.
template <auto function>
PyObject* with_arguments(PyObject*, PyObject* arguments, PyObject* keywords) {
  try {
    return function(arguments, keywords);
  } catch (const PythonError&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

template <auto function>
PyObject* without_arguments(PyObject*, PyObject*) {
  return with_arguments<[](PyObject*, PyObject*) { return to_python(function()); }>(nullptr, nullptr, nullptr);
}

template <auto function>
PyMethodDef method(const char* name, const char* doc) {
  if constexpr (std::is_invocable_v<decltype(function)>) {
    return {name, &without_arguments<function>, METH_NOARGS, doc};
  } else {
    const auto pointer = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&with_arguments<function>));
    return {name, pointer, METH_VARARGS | METH_KEYWORDS, doc};
  }
}

PyMethodDef methods[] = {
    method<build_info>("build_info", "How the binary was built. Values are empty where they do not apply."),
    method<dtypes>("dtypes", "The names of the dtypes that the ops take."),
    method<cpu_isa>("cpu_isa", "The instruction set whose CPU kernels run here; \"\" if LORA_EXT_CPU_ISA names none."),
    method<available_cpu_isas>("available_cpu_isas", "The instruction sets that this machine can run, best first."),
    method<base_product>("base_product",
                         "Who computes base products of many tokens, \"own\" or \"library\"; \"\" if "
                         "LORA_EXT_BASE_PRODUCT says neither."),
    method<call_streams_weight>("streams_weight",
                                "Whether the CUDA kernel for few tokens takes a layer of 16-bit weights."),
    method<all_refusals>("refusals", "name -> (exception, text), of csrc/refusals.h; {} stands for a part."),
    method<call_plan_forward>(
        "plan_forward",
        "The plan of a forward of layers, a list of (out_features, rank), that read one x. base_layers: with the\n"
        "products by the frozen weights, which a kernel for few tokens can compute, too."),
    method<call_plan_backward>(
        "plan_backward",
        "The plan of a backward. output_mask: whether grad_x, the grad_lora_A and the grad_lora_B are wanted."),
    method<call_plan_grouped>(
        "plan_grouped",
        "The plan of lora_grouped_ or of its backward, for rows that choose among the groups of one stack."),
    {}};

PyStructSequence_Field launch_fields[] = {{"kernel", "The kernel's name."},
                                          {"variant", "Its size: ranks of a block, or tiles; 0: it has one."},
                                          {"result", "The result that it computes: xa, y, grad_xa, ..."},
                                          {"grid", "Blocks along x and y."},
                                          {"blocks", "All blocks."},
                                          {"threads", "Threads of a block."},
                                          {"shared_bytes", "Dynamic shared memory of a block."},
                                          {"detail", "How the launch is divided into blocks."},
                                          {}};
PyStructSequence_Desc launch_description = {"lora_ext._C.Launch", "One launch of a plan.", launch_fields,
                                            std::size(launch_fields) - 1};

PyStructSequence_Field plan_fields[] = {{"launches", "In order."},
                                        {"scratch_bytes", "Scratch memory of the call."},
                                        {"streams_weights", "The launches compute the base layers, too."},
                                        {"text", "All of it, to read."},
                                        {}};
PyStructSequence_Desc plan_description = {"lora_ext._C.Plan", "The launches of a call on CUDA (csrc/cuda/plan.h).",
                                          plan_fields, std::size(plan_fields) - 1};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Facts about the compiled part of lora_ext, and the plans of its CUDA kernels. Needs no torch and no GPU.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace
}  // namespace lora_ext

PyMODINIT_FUNC PyInit__C() {
  using namespace lora_ext;
  launch_type = PyStructSequence_NewType(&launch_description);
  plan_type = PyStructSequence_NewType(&plan_description);
  return launch_type && plan_type ? PyModule_Create(&module) : nullptr;
}
