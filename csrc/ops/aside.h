// What an autograd function and the operators that it calls tell each other beside their arguments: facts that save
// time, and that other callers need not know.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace prunekernels {

// While it lives, operators on this thread find a fact about one tensor. Only the innermost of a kind counts.
template <typename Fact>
class Aside {
 public:
  explicit Aside(const at::Tensor& about, Fact fact = {})
      : fact(std::move(fact)), about_(about), outer_(std::exchange(innermost(), this)) {}
  ~Aside() { innermost() = outer_; }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;

  static Fact* find(const at::Tensor& about) {
    Aside* const found = innermost();
    return found && found->about_.is_same(about) ? &found->fact : nullptr;
  }

  Fact fact;

 private:
  static Aside*& innermost() {
    static thread_local Aside* innermost = nullptr;
    return innermost;
  }

  const at::Tensor about_;  // alive as long, so that no other tensor can be taken for it
  Aside* const outer_;
};

// Of the weight of a forward pass whose backward pass will read it too: if a plan copies the weight, in the dtype and
// the layout of the activations and with zeros in its dead entries, it leaves the copy here.
struct MaskedCopy {
  at::Tensor copy;
};

// Of such a copy.
struct DeadAreZero {};

// Of the weight of a forward pass: what its plan has packed of it for the same plan of the input's gradient. Then of
// the weight of that gradient.
struct PackedCopy {
  at::Tensor copy;
  bool tf32 = false;  // floats, rounded to it: torch may allow it in one pass and not in the other
};

// Of the gradient of the output: whether the gradient of the weight has shown that it holds no NaN and no infinity
// wherever a window has it.
struct IsFinite {
  bool known = false;
};

}  // namespace prunekernels
