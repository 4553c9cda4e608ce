// Checks an op's tensors by the shapes of csrc/schemas.h, which has their syntax.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string_view>

#include "arguments.h"

namespace lora_ext {

struct Shape {
  int argument = 0;  // its index
  std::string_view sizes{};
  char dtype = ' ';
  bool may_be_empty = false, is_contiguous = false;
};

constexpr size_t count_shapes(const char* text) {
  size_t count = *text != '\0';
  for (; *text != '\0'; ++text) count += *text == ' ';
  return count;
}

template <const auto& kSchema>
inline constexpr auto kShapes = [] {
  std::array<Shape, count_shapes(kSchema.shapes)> shapes;
  const char* at = kSchema.shapes;
  for (Shape& shape : shapes) {
    size_t length = 0;
    while (at[length] == '_' || (at[length] >= 'A' && at[length] <= 'z' && at[length] != '[')) ++length;
    shape.argument = find_argument(kSchema.text, {at, length});
    at += length;
    shape.may_be_empty = *at == '?';
    at += shape.may_be_empty;
    if (*at == '[') {
      length = 0;
      while (at[length + 1] != ']') ++length;
      shape.sizes = {at + 1, length};
      at += length + 2;
      shape.dtype = *at++;
    }
    shape.is_contiguous = *at == '!';
    at += shape.is_contiguous + (at[shape.is_contiguous] == ' ');
  }
  return shapes;
}();

class ShapeChecks {
 public:
  ShapeChecks(const Parameter* parameters, const Argument* arguments)
      : parameters_(parameters), arguments_(arguments) {}

  void check(std::span<const Shape> shapes) {
    const size_t entries = check_lengths(shapes);
    for (size_t entry = 0; entry < entries; ++entry) {
      for (const char symbol : entry > 0 ? kOfEntry : "") size(symbol) = {};
      for (const Shape& shape : shapes) {
        const Argument& argument = arguments_[shape.argument];
        if (entry >= argument.size || shape.sizes.empty()) continue;
        const int index = argument.is_list ? static_cast<int>(entry) : kNoIndex;
        if (const Tensor* tensor = argument.at(entry)) check(shape, {name(shape), index}, *tensor);
      }
    }
    for (const Shape& shape : shapes) {
      if (!shape.is_contiguous) continue;
      const Tensor& tensor = *arguments_[shape.argument].at(0);
      if (!tensor.is_contiguous()) refuse<"not_contiguous">(name(shape), sizes_text(tensor.strides()));
    }
  }

 private:
  static constexpr std::string_view kSymbols = "OoIiRrks", kOfEntry = "oirks";

  // The last tensor that has a size, with which the next is compared.
  struct Size {
    ArgumentName name{};
    const Tensor* tensor = nullptr;  // null: no tensor had it yet
    int64_t size = 0;
  };

  static constexpr const char* size_name(char symbol) {
    switch (symbol) {
      case 'O':
      case 'o': return "out_features";
      case 'I':
      case 'i': return "in_features";
      default: return "rank";
    }
  }

  Size& size(char symbol) { return sizes_[kSymbols.find(symbol)]; }
  std::string_view name(const Shape& shape) const { return parameters_[shape.argument].name; }

  // Returns the number of entries of the lists; 1 if there are none.
  size_t check_lengths(std::span<const Shape> shapes) const {
    const Shape* first = nullptr;
    size_t entries = 1;
    for (const Shape& shape : shapes) {
      const Argument& list = arguments_[shape.argument];
      if (!list.is_list || (list.size == 0 && shape.may_be_empty)) continue;
      if (list.size == 0) refuse<"empty_list">(name(shape));
      if (first && list.size != entries) refuse<"length_like">(name(shape), list.size, name(*first), entries);
      if (!first) first = &shape;
      entries = list.size;
    }
    return entries;
  }

  void check(const Shape& shape, const ArgumentName& name, const Tensor& tensor) {
    const std::string_view sizes = shape.sizes;
    const int64_t dims = tensor.dim();
    if (sizes[0] == '*' || sizes[0] == 'N') {
      if (dims == 0) refuse<"no_dimension">(name, size_name(sizes[1]));
      check_tokens(sizes[0] == '*', name, tensor);
      check_size(sizes[1], name, tensor, tensor.size(dims - 1));
    } else if (sizes.size() == 1) {
      const int64_t wanted = size(sizes[0]).size;
      if (dims != 1 || tensor.size(0) != wanted) {
        refuse<"shape">(name, sizes_text(tensor.sizes()), sizes_text(std::initializer_list<int64_t>{wanted}));
      }
    } else {
      const bool may_be_stack = sizes[0] == 's';
      if (dims != 2 && !(may_be_stack && dims == 3)) {
        refuse<"dimensions">(name, sizes_text(tensor.sizes()), may_be_stack ? "2 or 3" : "2");
      }
      if (may_be_stack) check_slots(name, tensor);
      check_size(sizes[sizes.size() - 2], name, tensor, tensor.size(dims - 2));
      check_size(sizes[sizes.size() - 1], name, tensor, tensor.size(dims - 1));
    }
    check_dtype(shape.dtype, name, tensor);
  }

  void check_size(char symbol, const ArgumentName& name, const Tensor& tensor, int64_t given) {
    Size& known = size(symbol);
    const bool is_rank = symbol == 'R' || symbol == 'r' || symbol == 'k';
    if (!known.tensor) {
      if (is_rank && symbol != 'k' && given < 1) refuse<"no_rank">(name);
    } else if (given != known.size) {
      if (is_rank) refuse<"rank">(name, given, known.name, known.size);
      refuse<"features">(name, size_name(symbol), given, known.name, known.size);
    }
    known = {name, &tensor, given};
  }

  // A matrix counts as no slots: the other factor must be a matrix, too.
  void check_slots(const ArgumentName& name, const Tensor& tensor) {
    const int64_t given = tensor.dim() == 3 ? tensor.size(0) : -1;
    Size& known = size('s');
    if (known.tensor && tensor.dim() != known.tensor->dim()) {
      refuse<"other_dimensions">(name, sizes_text(tensor.sizes()), known.name, sizes_text(known.tensor->sizes()));
    }
    if (known.tensor && given != known.size) refuse<"slots">(name, given, known.name, known.size);
    known = {name, &tensor, given};
  }

  void check_tokens(bool same_dimensions, const ArgumentName& name, const Tensor& tensor) {
    if (!tokens_.tensor) {
      tokens_ = {name, &tensor, count_tokens(tensor)};
    } else if (same_dimensions) {
      const Tensor& like = *tokens_.tensor;
      bool is_same = tensor.dim() == like.dim();
      for (int64_t i = 0; is_same && i + 1 < like.dim(); ++i) is_same = tensor.size(i) == like.size(i);
      if (is_same) return;
      refuse<"leading_shape">(name, sizes_text(tensor.sizes()), tokens_.name, sizes_text(like.sizes()));
    } else if (const int64_t given = count_tokens(tensor); given != tokens_.size) {
      refuse<"num_tokens">(name, given, tokens_.name, tokens_.size);
    }
  }

  void check_dtype(char kind, const ArgumentName& name, const Tensor& tensor) {
    Size& first = kind == 'f' ? factor_ : x_;  // only its name and tensor
    const int32_t code = dtype_code(tensor);
    if (kind == 'a') {
      const DType acc = accumulation_dtype(dtype_of(*first.tensor));
      if (code != dtype_code(acc)) refuse<"accumulation_dtype">(name, dtype_name(code), dtype_name(acc));
    } else if (!first.tensor) {
      if (!is_supported(tensor)) refuse<"dtype">(name, dtype_name(code));
      first = {name, &tensor, 0};
    } else if (code != dtype_code(*first.tensor)) {
      refuse<"other_dtype">(name, dtype_name(code), first.name, dtype_name(*first.tensor));
    }
  }

  const Parameter* parameters_;  // of each argument
  const Argument* arguments_;
  std::array<Size, kSymbols.size()> sizes_{};
  Size tokens_{}, x_{}, factor_{};
};

}  // namespace lora_ext
