#include "moegraft/parallel/updates.h"

#include "libtorch.h"

#include <algorithm>
#include <deque>
#include <numeric>
#include <utility>

#include "moegraft/base/check.h"

namespace moegraft::parallel {
namespace {

constexpr size_t kUnderWay = 4;  // buffers at a time

struct Parcel {
  at::Tensor buffer;
  std::vector<at::Tensor> parts;  // where the buffer's pieces belong; empty: it is a parameter itself
  bool ours = false;
  distributed::Pending pending;

  void finish() {
    pending.wait();
    if (ours) return;
    int64_t at_element = 0;
    for (auto& part : parts) {
      part.copy_(buffer.narrow(0, at_element, part.numel()).view(part.sizes()));
      at_element += part.numel();
    }
  }
};

}  // namespace

UpdateSharding::UpdateSharding(const model::ParameterRegistry& registry, distributed::Mesh mesh)
    : registry_(registry), mesh_(std::move(mesh)) {
  const auto& all = registry.all();
  const int64_t world = mesh_.world->size(), ep = mesh_.expert_size(), copies = mesh_.data_size();
  owners_.resize(all.size());
  mine_.resize(all.size());
  std::vector<size_t> order(all.size());
  std::iota(order.begin(), order.end(), size_t{0});
  // Expert parameters first: they load every expert index alike, the others even out what is left.
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::pair(all[a].sharding != model::Sharding::expert, -all[a].tensor.numel()) <
           std::pair(all[b].sharding != model::Sharding::expert, -all[b].tensor.numel());
  });
  std::vector<int64_t> owned(static_cast<size_t>(world));  // elements per rank of the world
  for (const size_t i : order) {
    const bool expert = all[i].sharding == model::Sharding::expert;
    mine_[i] = expert ? mesh_.data->rank() : mesh_.world->rank();
    int64_t least = 0;
    for (int64_t r = 1; r < (expert ? copies : world); ++r)
      if (owned[size_t(expert ? r * ep : r)] < owned[size_t(expert ? least * ep : least)]) least = r;
    owners_[i] = least;
    for (int64_t r = expert ? least * ep : least; r < (expert ? (least + 1) * ep : least + 1); ++r)
      owned[size_t(r)] += all[i].tensor.numel();
  }
}

std::vector<bool> UpdateSharding::owned() const {
  std::vector<bool> flags;
  for (size_t i = 0; i < owners_.size(); ++i) flags.push_back(owners_[i] == mine_[i]);
  return flags;
}

void UpdateSharding::share() const {
  at::NoGradGuard no_grad;
  const auto& all = registry_.all();
  std::deque<Parcel> under_way;
  const auto send = [&](bool expert, int64_t owner, at::Tensor buffer, std::vector<at::Tensor> parts) {
    distributed::Communicator& group = expert ? *mesh_.data : mesh_.world->all();
    if (under_way.size() >= kUnderWay) {
      under_way.front().finish();
      under_way.pop_front();
    }
    Parcel& parcel = under_way.emplace_back(Parcel{std::move(buffer), std::move(parts), owner == group.rank(), {}});
    if (!parcel.parts.empty() && parcel.ours) {
      std::vector<at::Tensor> flat;
      for (const auto& part : parcel.parts) flat.push_back(part.reshape({-1}));
      parcel.buffer = at::cat(flat);
    }
    parcel.pending = group.broadcast(parcel.buffer, owner, "updated parameters");
  };
  for (const bool expert : {false, true}) {
    const int64_t members = expert ? mesh_.data_size() : mesh_.world->size();
    if (members == 1) continue;
    for (int64_t owner = 0; owner < members; ++owner) {
      std::vector<at::Tensor> together;
      int64_t numel = 0;
      const auto flush = [&] {
        if (together.empty()) return;
        const at::Tensor buffer = at::empty({numel}, together[0].options());
        send(expert, owner, buffer, std::exchange(together, {}));
        numel = 0;
      };
      for (size_t i = 0; i < all.size(); ++i) {
        if ((all[i].sharding == model::Sharding::expert) != expert || owners_[i] != owner ||
            !all[i].tensor.grad().defined())
          continue;
        const at::Tensor value = all[i].tensor.detach();
        if (value.numel() >= kTogether) {
          send(expert, owner, value, {});
          continue;
        }
        if (numel + value.numel() > kTogether) flush();
        together.push_back(value);
        numel += value.numel();
      }
      flush();
    }
  }
  for (auto& parcel : under_way) parcel.finish();
}

}  // namespace moegraft::parallel
