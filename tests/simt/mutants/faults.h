// Operators that ../faults.py writes into copies of the kernels. Fault number N is inactive until simt_plant(N).
#pragma once

#include <algorithm>
#include <type_traits>

namespace simt {

// Returns whether this fault is active, and notes that a run came here (faults.cpp).
bool planted(int fault);

__forceinline__ constexpr bool is_planted(int fault) { return !std::is_constant_evaluated() && planted(fault); }

template <class T>
__forceinline__ constexpr T off_by_one(int fault, T value) {
  return is_planted(fault) ? value + 1 : value;
}

template <class T>
__forceinline__ constexpr T faulty_min(int fault, T first, T second) {
  return is_planted(fault) ? std::max(first, second) : std::min(first, second);
}

template <class T>
__forceinline__ constexpr T faulty_max(int fault, T first, T second) {
  return is_planted(fault) ? std::min(first, second) : std::max(first, second);
}

// `a + Plus{N} + b` is a + b, or a - b if fault N is active. The operator on both sides keeps the precedence, so that a
// text of operands need not be found.
#define SIMT_FAULTY(Name, original, mutated)                                                   \
  struct Name {                                                                                \
    int fault;                                                                                 \
  };                                                                                           \
  template <class A>                                                                           \
  struct Name##After {                                                                         \
    A a;                                                                                       \
    int fault;                                                                                 \
  };                                                                                           \
  template <class A>                                                                           \
  __forceinline__ constexpr Name##After<A> operator original(A a, Name name) {                 \
    return {a, name.fault};                                                                    \
  }                                                                                            \
  template <class A, class B>                                                                  \
    requires requires(A a, B b) { a mutated b; }                                               \
  __forceinline__ constexpr auto operator original(Name##After<A> left, B b) {                 \
    using Result = decltype(left.a original b);                                                \
    return static_cast<Result>(is_planted(left.fault) ? left.a mutated b : left.a original b); \
  }

SIMT_FAULTY(Less, <, <=)
SIMT_FAULTY(LessEqual, <=, <)
SIMT_FAULTY(Greater, >, >=)
SIMT_FAULTY(GreaterEqual, >=, >)
SIMT_FAULTY(Equal, ==, !=)
SIMT_FAULTY(NotEqual, !=, ==)
SIMT_FAULTY(Plus, +, -)
SIMT_FAULTY(Minus, -, +)
SIMT_FAULTY(Times, *, +)
SIMT_FAULTY(Over, /, *)
SIMT_FAULTY(Modulo, %, /)
SIMT_FAULTY(ShiftLeft, <<, >>)
SIMT_FAULTY(ShiftRight, >>, <<)
SIMT_FAULTY(And, &, |)
SIMT_FAULTY(Or, |, &)
SIMT_FAULTY(Xor, ^, |)

#undef SIMT_FAULTY

}  // namespace simt
