// Dealing a step to processes and micro-batches: nothing lost, nothing twice, balanced, the same steps for any layout.
#include "moegraft/data/deal.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "moegraft/base/rng.h"
#include "moegraft/data/balance.h"
#include "moegraft/data/prefetch.h"
#include "stream_fixture.h"

namespace moegraft::data {
namespace {

using test::kFirst;
using test::Longs;
using test::values;
using Data = test::StreamData;

int64_t total(const Longs& list) { return std::accumulate(list.begin(), list.end(), int64_t{0}); }

TEST(Deal, LongestFirstOntoTheLeastLoaded) {
  // 9 | 8 | then 4 onto 8's part, 3 onto 9's; both cost about the same, the dearer goes to rank 0.
  const Deal d = deal({3, 9, 4, 8}, {1, 0, 2}, 16);
  EXPECT_EQ(d.part_of, (Longs{0, 0, 1, 1}));
  EXPECT_EQ(d.tokens, (Longs{12, 12}));
  EXPECT_EQ(d.cost, (Longs{sequence_cost(9) + sequence_cost(3), sequence_cost(8) + sequence_cost(4)}));
  // Two rounds of two: {8}, {7} then {3}, {2}: rank 0 has most after the first, so least of the second.
  EXPECT_EQ(deal({2, 8, 3, 7}, {2, 0, 2}, 16).part_of, (Longs{1, 0, 3, 2}));
  EXPECT_EQ(deal({5, 5, 5}, {}, 16).part_of, (Longs{0, 0, 0}));
  EXPECT_EQ(deal({}, {2, 1, 2}, 16).tokens, (Longs{0, 0, 0, 0}));
}

TEST(Deal, IsBalancedAndWithinTheBound) {
  for (const int64_t longest : {24, 512, 16384})
    for (const int64_t world : {1, 2, 3, 8})
      for (const int64_t accumulation : {1, 2, 5})
        for (uint64_t trial = 0; trial < 20; ++trial) {
          Rng rng(trial, "deal");
          Longs lengths;
          const uint64_t count = 1 + rng.below(200);
          for (uint64_t i = 0; i < count; ++i)
            lengths.push_back(1 + static_cast<int64_t>(rng.below(rng.below(2) ? 16 : static_cast<uint64_t>(longest))));
          const Share share{accumulation, 0, world};
          const Deal d = deal(lengths, share, longest);
          Longs tokens(d.tokens.size(), 0), cost(d.tokens.size(), 0);
          for (size_t s = 0; s < lengths.size(); ++s) {
            ASSERT_TRUE(d.part_of[s] >= 0 && d.part_of[s] < share.parts());
            tokens[d.part_of[s]] += lengths[s];
            cost[d.part_of[s]] += sequence_cost(lengths[s]);
          }
          EXPECT_EQ(tokens, d.tokens);
          EXPECT_EQ(cost, d.cost);
          const int64_t largest = *std::max_element(lengths.begin(), lengths.end());
          EXPECT_LE(*std::max_element(tokens.begin(), tokens.end()), total(lengths) / share.parts() + longest);
          EXPECT_LE(*std::max_element(cost.begin(), cost.end()), total(cost) / share.parts() + sequence_cost(largest));
          // Ranks differ by no more than one sequence, whatever the accumulation, and so do they in each micro-batch.
          Longs ranks(world, 0);
          for (int64_t p = 0; p < share.parts(); ++p) ranks[p / accumulation] += cost[p];
          const auto [low, high] = std::minmax_element(ranks.begin(), ranks.end());
          if (longest <= 512) { EXPECT_LE(*high - *low, sequence_cost(largest)); }
          for (int64_t i = 0; i < accumulation && longest <= 512; ++i) {
            Longs at_once;
            for (int64_t r = 0; r < world; ++r) at_once.push_back(cost[r * accumulation + i]);
            EXPECT_LE(
                *std::max_element(at_once.begin(), at_once.end()) - *std::min_element(at_once.begin(), at_once.end()),
                sequence_cost(largest));
          }
        }
}

TEST(Deal, TheLargestMicroBatchIsAnEvenShareAndASequence) {
  DataConfig config;
  config.tokens_per_step = 1000, config.sequence_length = 100;
  EXPECT_EQ(largest_micro_batch(config, {}), 1000);
  EXPECT_EQ(largest_micro_batch(config, {2, 0, 2}), 350);
  EXPECT_EQ(largest_micro_batch(config, {1, 0, 2}), 600);
  config.sequence_length = 900;
  EXPECT_EQ(largest_micro_batch(config, {1, 0, 2}), 1000);
}

struct Layout {
  int64_t world, accumulation;
};
std::vector<Layout> layouts() {
  std::vector<Layout> out;
  for (const int64_t world : {1, 2, 3, 4, 8})
    for (const int64_t accumulation : {1, 2, 5}) out.push_back({world, accumulation});
  return out;
}

struct Dealing : Data {
  // (ids, labels, modality) of each sequence.
  static std::vector<Longs> contents(const model::PackedBatch& batch) {
    std::vector<Longs> out = sequences(batch);
    const auto labels = values(batch.labels_T), modality = values(batch.modality_T);
    for (int64_t s = 0; s < batch.num_sequences(); ++s)
      for (int64_t t = batch.cu_seqlens[s]; t < batch.cu_seqlens[s + 1]; ++t)
        out[s].push_back(labels[t]), out[s].push_back(modality[t]);
    return out;
  }
  // Of one step for all ranks: every part's sequences in order of the whole step, its sums, and the same cursor
  // everywhere.
  void expect_dealt(const StepBatch& one, const std::string& state, std::vector<BatchStream>& ranks,
                    const Layout& layout) {
    const auto whole = contents(one.micro_batches[0]);
    std::vector<Longs> all;
    for (size_t r = 0; r < ranks.size(); ++r) {
      const StepBatch step = ranks[r].next();
      EXPECT_EQ(ranks[r].state(), state);
      EXPECT_EQ(step.num_tokens, one.num_tokens);
      EXPECT_EQ(step.num_labels, one.num_labels);
      EXPECT_EQ(total(step.rank_tokens), one.num_tokens);
      ASSERT_EQ(step.micro_batches.size(), static_cast<size_t>(layout.accumulation));
      int64_t tokens = 0;
      for (const auto& batch : step.micro_batches) {
        ASSERT_NE(batch.facts, nullptr);
        if (batch.facts->placeholder) {
          EXPECT_EQ(values(batch.ids_T), Longs{1});
          EXPECT_EQ(values(batch.labels_T), Longs{model::kNoLabel});
          EXPECT_EQ(batch.facts->num_labels, 0);
          continue;
        }
        tokens += batch.num_tokens();
        EXPECT_LE(batch.num_tokens(), largest_micro_batch(config, {layout.accumulation, 0, layout.world}));
        auto from = whole.begin();
        for (const auto& sequence : contents(batch)) {
          from = std::find(from, whole.end(), sequence);
          ASSERT_NE(from, whole.end()) << "a sequence that the step has not, or out of order";
          ++from;
          all.push_back(sequence);
        }
      }
      EXPECT_EQ(step.rank_tokens[r], tokens);
    }
    auto expected = whole;
    std::sort(expected.begin(), expected.end());
    std::sort(all.begin(), all.end());
    EXPECT_EQ(all, expected);
  }
};

TEST_F(Dealing, RanksTogetherHaveTheStepOfOneProcess) {
  config.caption_dropout = 0.4;
  for (const Batching batching : {Batching::mixed, Batching::modality})
    for (const Packing packing : {Packing::documents, Packing::stream})
      for (const Layout& layout : layouts()) {
        SCOPED_TRACE(::testing::Message() << config::name_of(batching) << " " << config::name_of(packing) << " world "
                                          << layout.world << " accumulation " << layout.accumulation);
        config.batching = batching, config.packing = packing;
        config.tokens_per_step = 150;
        auto one = stream();
        std::vector<BatchStream> ranks;
        for (int64_t r = 0; r < layout.world; ++r) ranks.push_back(stream(17, {layout.accumulation, r, layout.world}));
        for (int step = 0; step < 8; ++step) {
          const StepBatch whole = one.next();
          expect_dealt(whole, one.state(), ranks, layout);
        }
      }
}

TEST_F(Dealing, ACursorGoesOnUnderAnyLayout) {
  config.caption_dropout = 0.4;
  for (const Batching batching : {Batching::mixed, Batching::modality})
    for (const Packing packing : {Packing::documents, Packing::stream}) {
      config.batching = batching, config.packing = packing;
      auto written = stream(17, {3, 1, 2});
      auto one = stream();
      for (int step = 0; step < 20; ++step) {
        const std::string state = written.state();
        EXPECT_EQ(state, one.state());
        std::vector<BatchStream> ranks;
        for (int64_t r = 0; r < 4; ++r) {
          ranks.push_back(stream(17, {2, r, 4}));
          ranks.back().next();
          ranks.back().restore(state);
          EXPECT_EQ(ranks.back().state(), state);
          EXPECT_EQ(ranks.back().counts().documents, one.counts().documents);
          EXPECT_EQ(ranks.back().counts().skipped, one.counts().skipped);
        }
        written.next();
        const StepBatch whole = one.next();
        expect_dealt(whole, one.state(), ranks, {4, 2});
      }
    }
}

// As many ranks as there are, one sequence: the others compute a token of nothing.
TEST_F(Dealing, SharesMayBeEmpty) {
  config.sequence_length = config.tokens_per_step = 10;
  config.train = {{(folder / "pictures").string(), 1.0}};
  int64_t made = 0;
  for (int64_t r = 0; r < 4; ++r) {
    auto s = stream(17, {1, r, 4});
    const StepBatch step = s.next();
    EXPECT_EQ(std::count(step.rank_tokens.begin(), step.rank_tokens.end(), 0), 3);
    EXPECT_GT(step.num_labels, 0);
    const auto& facts = *step.micro_batches[0].facts;
    EXPECT_EQ(facts.placeholder, step.rank_tokens[r] == 0);
    EXPECT_EQ(facts.num_labels, facts.placeholder ? 0 : step.num_labels);
    made += !facts.placeholder;
  }
  EXPECT_EQ(made, 1);
  // Without a BOS the placeholder is id 0.
  auto v = test::vocabulary();
  v.bos_id = -1;
  EXPECT_EQ(values(placeholder_batch(v).ids_T), Longs{0});
}

TEST_F(Dealing, PrefetchingDealsTheSame) {
  for (const Batching batching : {Batching::mixed, Batching::modality}) {
    config.batching = batching;
    auto plain = stream(17, {2, 1, 3});
    PrefetchStream ahead(std::make_unique<BatchStream>(config.train, config, test::vocabulary(), 17, Share{2, 1, 3}),
                         3);
    for (int i = 0; i < 12; ++i) {
      const StepBatch a = ahead.next(), b = plain.next();
      EXPECT_EQ(a.rank_tokens, b.rank_tokens);
      EXPECT_EQ(a.num_labels, b.num_labels);
      for (int m = 0; m < 2; ++m) expect_equal(a.micro_batches[m], b.micro_batches[m]);
      EXPECT_EQ(ahead.state(), plain.state());
    }
  }
}

TEST_F(Dealing, SkippingAStepSaysWhatItHolds) {
  for (const Batching batching : {Batching::mixed, Batching::modality}) {
    config.batching = batching;
    auto plain = stream(), skipping = stream();
    for (int i = 0; i < 30; ++i) {
      const auto batch = whole(plain.next());
      const StepOutline step = skipping.skip();
      EXPECT_EQ(skipping.state(), plain.state());
      EXPECT_EQ(total(step.tokens), batch.num_tokens());
      EXPECT_EQ(total(step.labels), batch.facts->num_labels);
      EXPECT_EQ(total(step.new_tokens), batch.modality_T.ne(0).sum().item<int64_t>());
    }
  }
}

// What dealing knows of a document is what assembling makes of it.
TEST(Outline, IsThatOfTheAssembledDocument) {
  Rng rng(5, "outline");
  for (int trial = 0; trial < 400; ++trial) {
    test::Lists lists;
    bool text = rng.below(2);
    for (uint64_t n = 1 + rng.below(4); n > 0; --n, text = !text)
      lists.push_back({text ? 0 : 1, std::vector<int32_t>(text ? 1 + rng.below(5) : 4 * (1 + rng.below(3)), 3)});
    DataConfig config;
    config.add_bos = rng.below(2), config.add_eos = rng.below(2), config.caption_labels = rng.below(2);
    auto vocabulary = test::vocabulary();
    if (rng.below(4) == 0) vocabulary.bos_id = -1;
    const auto segments = test::to_segments(lists);
    const bool drop = is_captioned_item(segments, vocabulary) && rng.below(2);
    const Sequence s = assemble(segments, vocabulary, config, drop);
    const Outline o = outline(segments, vocabulary, config, drop);
    EXPECT_EQ(o.size, s.size());
    EXPECT_EQ(o.text_only, s.text_only);
    EXPECT_EQ(o.num_labels, std::count_if(s.labels.begin(), s.labels.end(), [](int64_t l) { return l >= 0; }));
    EXPECT_EQ(o.new_tokens, std::count(s.modality.begin(), s.modality.end(), 1));
  }
}

TEST_F(Dealing, BalanceIsWhatTheRanksGet) {
  config.tokens_per_step = 200;
  for (const Batching batching : {Batching::mixed, Batching::modality}) {
    config.batching = batching;
    auto s = stream();
    const Balance b = measure_balance(s, {2, 0, 3}, config.sequence_length, 20);
    EXPECT_EQ(b.steps, 20);
    EXPECT_EQ(b.combinations_per_step == 1, config.batching == Batching::modality);
    // From the batches themselves.
    std::vector<BatchStream> ranks;
    for (int64_t r = 0; r < 3; ++r) ranks.push_back(stream(17, {2, r, 3}));
    double sum = 0, worst = 0, steps = 0;
    int64_t tokens = 0;
    for (int i = 0; i < 20; ++i) {
      Longs fresh;
      for (auto& rank : ranks) {
        fresh.push_back(0);
        const StepBatch step = rank.next();
        for (const auto& batch : step.micro_batches) fresh.back() += batch.modality_T.ne(0).sum().item<int64_t>();
        if (fresh.size() == 1) tokens += step.num_tokens;
      }
      if (total(fresh) == 0) continue;
      const double ratio = 3.0 * double(*std::max_element(fresh.begin(), fresh.end())) / double(total(fresh));
      sum += ratio, worst = std::max(worst, ratio), ++steps;
    }
    EXPECT_EQ(b.tokens, tokens);
    EXPECT_DOUBLE_EQ(b.new_tokens.mean, sum / steps);
    EXPECT_DOUBLE_EQ(b.new_tokens.worst, worst);
  }
}

TEST_F(Dealing, EvaluationBatchesGoRoundTheRanks) {
  for (const int64_t max_tokens : {0, 150}) {
    EvalStream one(config.train, config, test::vocabulary(), max_tokens);
    std::vector<model::PackedBatch> batches;
    while (auto batch = one.next()) batches.push_back(*batch);
    ASSERT_GE(batches.size(), 3u);
    for (const int64_t world : {2, 3, 4, 8}) {
      const size_t rounds = (batches.size() + world - 1) / world;
      for (int64_t r = 0; r < world; ++r) {
        EvalStream part(config.train, config, test::vocabulary(), max_tokens, {1, r, world});
        for (int again = 0; again < 2; ++again, part.rewind()) {
          for (size_t i = 0; i < rounds; ++i) {
            const auto batch = part.next();
            ASSERT_TRUE(batch.has_value());
            const size_t at = i * world + r;
            EXPECT_EQ(batch->facts->placeholder, at >= batches.size());
            if (at < batches.size()) expect_equal(*batch, batches[at]);
          }
          EXPECT_FALSE(part.next().has_value());
        }
      }
    }
  }
}

}  // namespace
}  // namespace moegraft::data
