#pragma once
// Low-rank factors laid out for a backend's products, kept from call to call.

#include <typeindex>
#include <vector>

#include "moe.h"

namespace moegraft::kernels {

class FactorCache {
 public:
  // What `make` made for these very terms: the same tensors, scales and groups, in the same dtype. Anything else is
  // made anew.
  template <class Content, class Make>
  Content& content(const MoeProblem& p, const Make& make) {
    Signature now{typeid(Content), p.x_XD.scalar_type(), p.dispatch.num_groups, {}};
    for (int s = 0; s < kSites; ++s)
      for (const ExpertLowRank& term : p.terms[s])
        now.terms.push_back({s, term.A_EPX.const_data_ptr(), term.B_EXP.const_data_ptr(), term.scale, term.acts});
    if (!content_ || !(now == signature_)) {
      content_ = std::shared_ptr<Content>(make());
      signature_ = std::move(now);
    }
    return *static_cast<Content*>(content_.get());
  }

 private:
  struct Term {
    int site;
    const void *A, *B;
    double scale;
    std::vector<bool> acts;
    bool operator==(const Term&) const = default;
  };
  struct Signature {
    std::type_index content = typeid(void);
    at::ScalarType dtype{};
    int64_t num_groups = 0;
    std::vector<Term> terms;
    bool operator==(const Signature&) const = default;
  };
  Signature signature_;
  std::shared_ptr<void> content_;
};

}  // namespace moegraft::kernels
