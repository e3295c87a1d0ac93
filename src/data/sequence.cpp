#include "moegraft/data/sequence.h"

#include <algorithm>
#include <numeric>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::data {
namespace {

const model::ModalityTokens& tokens_of(const model::Vocabulary& vocabulary, int64_t modality) {
  for (const auto& tokens : vocabulary.modalities)
    if (tokens.modality == modality) return tokens;
  fail<InvariantError>("no modality ", modality, " in the vocabulary");
}

}  // namespace

Source::Source(const std::string& path, const model::Vocabulary& vocabulary) : shards_(path) {
  const auto& schema = shards_.schema().modalities;
  MOEGRAFT_CHECK(schema[0].num_codes <= vocabulary.text_size, path, ": its text has ids up to ",
                 schema[0].num_codes - 1, ", the model's vocabulary has ", vocabulary.text_size,
                 " (tokenise it with the model's own tokenizer)");
  modality_.push_back(0);
  for (size_t m = 1; m < schema.size(); ++m) {
    const model::ModalityTokens* tokens = nullptr;
    std::vector<std::string> known;
    for (const auto& candidate : vocabulary.modalities) {
      known.push_back(candidate.name);
      if (candidate.name == schema[m].name) tokens = &candidate;
    }
    MOEGRAFT_CHECK(tokens != nullptr, path, " holds the modality \"", schema[m].name,
                   "\", which the run does not have (its modalities: ", known.empty() ? "none" : join(known, ", "),
                   ")");
    MOEGRAFT_CHECK(tokens->num_codes == schema[m].num_codes, path, ": ", schema[m].name,
                   " codes come from a codebook of ", schema[m].num_codes, ", the run's has ", tokens->num_codes,
                   " (prepare the data with the run's codec)");
    MOEGRAFT_CHECK(tokens->item_length == schema[m].item_length, path, ": a ", schema[m].name, " has ",
                   schema[m].item_length, " codes, the run's has ", tokens->item_length,
                   " (prepare the data with the run's codec)");
    MOEGRAFT_CHECK(tokens->codebooks == schema[m].codebooks, path, ": ", schema[m].name, " codes come from ",
                   schema[m].codebooks, " codebook(s) at each position, the run's from ", tokens->codebooks,
                   " (prepare the data with the run's codec)");
    modality_.push_back(tokens->modality);
  }
}

std::vector<Segment> Source::document(int64_t index) const { return in_vocabulary(shards_.document(index)); }
std::vector<Segment> Source::runs(int64_t index) const { return in_vocabulary(shards_.runs(index)); }

std::vector<Segment> Source::in_vocabulary(std::vector<Segment> segments) const {
  for (auto& segment : segments) segment.modality = modality_[segment.modality];
  return segments;
}

Sequence assemble(const std::vector<Segment>& segments, const model::Vocabulary& vocabulary, const DataConfig& config,
                  bool drop_caption) {
  Sequence out;
  std::vector<bool> predicted;
  auto push = [&](int64_t id, int64_t modality, bool predict) {
    out.ids.push_back(id);
    out.modality.push_back(modality);
    predicted.push_back(predict);
  };
  for (const auto& segment : segments) out.text_only &= segment.modality == 0;
  const bool predict_text = out.text_only || config.caption_labels;
  if (config.add_bos && vocabulary.bos_id >= 0) push(vocabulary.bos_id, 0, false);
  for (const auto& segment : segments) {
    if (segment.modality == 0) {
      if (drop_caption) continue;
      for (int32_t id : segment.ids) push(id, 0, predict_text);
      continue;
    }
    const auto& tokens = tokens_of(vocabulary, segment.modality);
    for (size_t i = 0; i < segment.ids.size(); ++i) {
      const int64_t in_item = static_cast<int64_t>(i) % tokens.item_length;
      if (in_item == 0) push(tokens.begin_id(), segment.modality, false);
      push(tokens.code_id(segment.ids[i]), segment.modality, true);
      if (in_item == tokens.item_length - 1) push(tokens.end_id(), segment.modality, true);
    }
  }
  const bool ends_in_text = !segments.empty() && segments.back().modality == 0 && !drop_caption;
  if (ends_in_text && config.add_eos && vocabulary.eos_id >= 0) push(vocabulary.eos_id, 0, predict_text);
  out.labels.assign(out.ids.size(), model::kNoLabel);
  for (size_t t = 0; t + 1 < out.ids.size(); ++t)
    if (predicted[t + 1]) out.labels[t] = out.ids[t + 1];
  return out;
}

void replace_caption(Sequence& sequence, const model::Vocabulary& vocabulary, double share, Rng& rng) {
  if (sequence.text_only) return;
  for (size_t t = 0; t < sequence.ids.size(); ++t) {
    int64_t& id = sequence.ids[t];
    if (sequence.modality[t] != 0 || id == vocabulary.bos_id || id == vocabulary.eos_id || rng.uniform() >= share)
      continue;
    id = static_cast<int64_t>(rng.below(static_cast<uint64_t>(vocabulary.text_size)));
  }
}

void replace_codes(Sequence& sequence, const model::Vocabulary& vocabulary, double share, Rng& rng) {
  for (size_t t = 0; t < sequence.ids.size(); ++t) {
    if (sequence.modality[t] == 0) continue;
    const auto& tokens = tokens_of(vocabulary, sequence.modality[t]);
    const int64_t first = tokens.code_id(0), code = sequence.ids[t] - first;
    if (code < 0 || code >= tokens.num_codes || rng.uniform() >= share) continue;
    const int64_t size = tokens.codebook_size();
    sequence.ids[t] = first + code / size * size + static_cast<int64_t>(rng.below(static_cast<uint64_t>(size)));
  }
}

Outline outline(const std::vector<Segment>& segments, const model::Vocabulary& vocabulary, const DataConfig& config,
                bool drop_caption) {
  Outline out;
  for (const auto& segment : segments) out.text_only &= segment.modality == 0;
  const bool predict_text = out.text_only || config.caption_labels;
  const bool bos = config.add_bos && vocabulary.bos_id >= 0;
  int64_t text = 0;
  for (const auto& segment : segments) {
    const auto count = static_cast<int64_t>(segment.ids.size());
    MOEGRAFT_INVARIANT(segment.modality >= 0 && segment.modality < 64, "modality ", segment.modality);
    out.modalities |= uint64_t{1} << segment.modality;
    out.stored_size += count;
    if (segment.modality == 0) {
      text += drop_caption ? 0 : count;
      continue;
    }
    const int64_t items = count / tokens_of(vocabulary, segment.modality).item_length;
    out.new_tokens += count + 2 * items;
    out.num_labels += count + items;
  }
  if (!segments.empty() && segments.back().modality == 0 && !drop_caption && config.add_eos && vocabulary.eos_id >= 0)
    ++text;
  // The first token of a sequence is predicted by none.
  const bool begins_in_text = !bos && !segments.empty() && segments.front().modality == 0 && !drop_caption;
  if (predict_text) out.num_labels += text - begins_in_text;
  out.size = bos + text + out.new_tokens;
  return out;
}

bool is_captioned_item(const std::vector<Segment>& segments, const model::Vocabulary& vocabulary) {
  int64_t items = 0, texts = 0;
  for (const auto& segment : segments) {
    if (segment.modality == 0)
      ++texts;
    else
      items += static_cast<int64_t>(segment.ids.size()) / tokens_of(vocabulary, segment.modality).item_length;
  }
  return items == 1 && texts > 0;
}

model::PackedBatch pack(const std::vector<Sequence>& sequences) {
  std::vector<int64_t> cu_seqlens{0};
  for (const auto& sequence : sequences) cu_seqlens.push_back(cu_seqlens.back() + sequence.size());
  const auto lay_out = [&](const std::vector<int64_t> Sequence::* field) {
    at::Tensor out_T = at::empty({cu_seqlens.back()}, at::kLong);
    auto* to = out_T.mutable_data_ptr<int64_t>();
    for (const auto& sequence : sequences) to = std::copy((sequence.*field).begin(), (sequence.*field).end(), to);
    return out_T;
  };
  at::Tensor positions_T = at::empty({cu_seqlens.back()}, at::kLong);
  auto* positions = positions_T.mutable_data_ptr<int64_t>();
  for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s)
    std::iota(positions + cu_seqlens[s], positions + cu_seqlens[s + 1], 0);
  model::PackedBatch batch{
      lay_out(&Sequence::ids), lay_out(&Sequence::modality), positions_T, {}, lay_out(&Sequence::labels)};
  batch.cu_seqlens = std::move(cu_seqlens);
  return batch;
}

model::PackedBatch placeholder_batch(const model::Vocabulary& vocabulary) {
  model::PackedBatch batch = pack({{{std::max<int64_t>(vocabulary.bos_id, 0)}, {0}, {model::kNoLabel}}});
  auto facts = model::describe_batch(batch, vocabulary.id_bounds());
  facts.placeholder = true;
  batch.facts = std::make_shared<const model::BatchFacts>(std::move(facts));
  return batch;
}

}  // namespace moegraft::data
