#include "moegraft/model/registry.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <set>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/model/vocabulary.h"
#include "moegraft/model/weights.h"

namespace moegraft::model {
namespace {

at::Tensor leaf(at::IntArrayRef shape) { return torch::ones(shape).set_requires_grad(true); }

TEST(Registry, KeepsOrderAndCounts) {
  ParameterRegistry registry;
  registry.add({"b", leaf({2, 3}), "lora", {1}});
  registry.add({"a", leaf({4}), "base"});
  EXPECT_EQ(registry.all()[0].name, "b");
  EXPECT_EQ(registry.num_elements(), 10);
  ASSERT_NE(registry.find("a"), nullptr);
  EXPECT_EQ(registry.find("a")->group, "base");
  EXPECT_EQ(registry.find("c"), nullptr);
}

TEST(Registry, RefusesWhatCannotTrain) {
  ParameterRegistry registry;
  const auto tensor = leaf({2});
  registry.add({"a", tensor, "lora"});
  EXPECT_THROW(registry.add({"a", leaf({2}), "lora"}), InvariantError) << "duplicate name";
  EXPECT_THROW(registry.add({"b", tensor, "lora"}), InvariantError) << "one tensor under two names";
  EXPECT_THROW(registry.add({"c", torch::ones({2}), "lora"}), InvariantError) << "no grad";
  EXPECT_THROW(registry.add({"d", torch::ones({2}, at::kDouble).set_requires_grad(true), "lora"}), InvariantError)
      << "not float32";
  EXPECT_THROW(registry.add({"e", leaf({2}) * 2, "lora"}), InvariantError) << "not a leaf";
  EXPECT_THROW(registry.add({"f", at::Tensor(), "lora"}), InvariantError);
}

TEST(Registry, ZeroGradUndefinesAndTrainableFollowsThePrefix) {
  ParameterRegistry registry;
  registry.add({"adapters.0.A", leaf({2}), "lora"});
  registry.add({"rows.image", leaf({2}), "embeddings"});
  (registry.all()[0].tensor.sum() + registry.all()[1].tensor.sum()).backward();
  EXPECT_TRUE(registry.all()[0].tensor.grad().defined());
  registry.set_trainable("adapters.", false);
  EXPECT_FALSE(registry.all()[0].tensor.requires_grad());
  EXPECT_FALSE(registry.all()[0].tensor.grad().defined());
  EXPECT_TRUE(registry.all()[1].tensor.requires_grad());
  registry.zero_grad();
  EXPECT_FALSE(registry.all()[1].tensor.grad().defined());
}

TEST(Registry, TheBasesTensorsSayWhichLayerTheyAreOf) {
  BaseModel base = init_base(read_spec(std::filesystem::path(test_source_dir()) / "tests/golden/model/qwen3_mixed"),
                             {1.0, 3});  // dense and sparse layers
  ParameterRegistry registry;
  register_base(base, registry);
  std::set<int64_t> layers;
  for (const auto& p : registry.all()) {
    ASSERT_EQ(p.layer.has_value(), p.name.starts_with("model.layers.")) << p.name;
    if (!p.layer) continue;
    EXPECT_TRUE(p.name.starts_with("model.layers." + std::to_string(*p.layer) + ".")) << p.name;
    layers.insert(*p.layer);
  }
  EXPECT_EQ(int64_t(layers.size()), base.spec.num_layers);
}

TEST(Vocabulary, IdsFollowTheTextOnes) {
  Vocabulary vocabulary{100, 1, 2, {{"image", 1, 100, 8, 4}, {"sound", 2, 110, 3, 2}}};
  EXPECT_EQ(vocabulary.size(), 115);
  EXPECT_EQ(vocabulary.modality_of(0), 0);
  EXPECT_EQ(vocabulary.modality_of(99), 0);
  EXPECT_EQ(vocabulary.modality_of(100), 1);
  EXPECT_EQ(vocabulary.modality_of(vocabulary.by_name("image").code_id(7)), 1);
  EXPECT_EQ(vocabulary.modality_of(vocabulary.by_name("sound").begin_id()), 2);
  EXPECT_EQ(vocabulary.by_name("sound").end_id(), 111);
  EXPECT_THROW(vocabulary.modality_of(115), UserError);
  EXPECT_THROW(vocabulary.modality_of(-1), UserError);
  EXPECT_THROW(vocabulary.by_name("video"), UserError);
}

TEST(Vocabulary, PlacesOfAnItemTakeTurnsAmongTheCodebooks) {
  const ModalityTokens image{"image", 1, 100, 8, 4}, sound{"sound", 2, 110, 12, 6, 3};
  EXPECT_EQ(image.codebook_size(), 8);
  EXPECT_EQ(sound.codebook_size(), 4);
  EXPECT_EQ(sound.num_rows(), 14);
  for (int64_t place = 0; place < 6; ++place) {
    EXPECT_EQ(image.first_code(place), 0);
    EXPECT_EQ(sound.first_code(place), std::vector<int64_t>({0, 4, 8, 0, 4, 8})[size_t(place)]);
  }
}

}  // namespace
}  // namespace moegraft::model
