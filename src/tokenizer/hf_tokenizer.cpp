#include "hf_tokenizer.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <unordered_set>

#include "added_tokens.h"
#include "bpe.h"
#include "files.h"
#include "moegraft/base/log.h"
#include "normalizer.h"
#include "pre_tokenizer.h"
#include "regex.h"
#include "token_decoder.h"
#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

constexpr size_t kMaxPipeline = 10'000;  // values of one component and all inside it; real ones have a few hundred

size_t count_values(const nlohmann::json& value) {
  size_t count = 1;
  if (value.is_structured())
    for (const auto& part : value) count += count_values(part);
  return count;
}

// Ids put before and after a text by the post-processor.
struct Template {
  std::vector<int64_t> before, after;

  void wrap(const Template& outer) {
    before.insert(before.begin(), outer.before.begin(), outer.before.end());
    after.insert(after.end(), outer.after.begin(), outer.after.end());
  }
};

Template template_processing(const Field& field) {
  Template out;
  bool seen = false;
  for (const auto& item : field.at("single").items()) {
    if (item.has("Sequence")) {
      item.expect(!seen, "one Sequence in 'single'");
      seen = true;
      continue;
    }
    const Field token = item.at("SpecialToken").at("id");
    const std::string name = token.string();
    const Field tokens = field.at("special_tokens");
    tokens.expect(tokens.has(name.c_str()), "the special token " + name);
    for (const auto& id : tokens.at(name.c_str()).at("ids").items())
      (seen ? out.after : out.before).push_back(id.integer(0, INT32_MAX));
  }
  field.expect(seen, "a Sequence in 'single'");
  return out;
}

int64_t pair_id(const Field& field) {
  const auto items = field.items();
  field.expect(items.size() == 2, "a token and its id");
  return items[1].integer(0, INT32_MAX);
}

Template make_template(const Field& field) {
  const std::string type = field.type();
  if (type == "ByteLevel") return {};  // it only trims offsets
  if (type == "TemplateProcessing") return template_processing(field);
  if (type == "BertProcessing" || type == "RobertaProcessing")
    return {{pair_id(field.at("cls"))}, {pair_id(field.at("sep"))}};
  if (type == "Sequence") {
    Template out;
    for (const auto& item : field.at("processors").items()) out.wrap(make_template(item));
    return out;
  }
  field.unsupported("post_processor", "TemplateProcessing, ByteLevel, BertProcessing, RobertaProcessing, Sequence");
}

class HfTokenizer : public Tokenizer {
 public:
  HfTokenizer(const Field& root, const std::filesystem::path& dir) : bpe_(root.at("model")) {
    const RegexBudget budget(0);  // added tokens are normalised once
    for (const char* part : {"normalizer", "pre_tokenizer", "decoder", "post_processor"})
      if (root.has(part))
        root.at(part).expect(count_values(root.at(part).value()) <= kMaxPipeline,
                             "at most " + std::to_string(kMaxPipeline) + " values");
    if (root.has("normalizer")) normalizer_ = make_normalizer(root.at("normalizer"));
    if (root.has("pre_tokenizer")) pre_tokenizer_ = make_pre_tokenizer(root.at("pre_tokenizer"));
    if (root.has("decoder")) decoder_ = make_token_decoder(root.at("decoder"));
    if (root.has("post_processor")) template_ = make_template(root.at("post_processor"));
    for (const char* key : {"truncation", "padding"}) {
      if (root.has(key)) log::debug(root.place(), ": '", key, "' is ignored: texts keep their length");
    }
    read_tokens(root, dir);
    find_ends(dir);
    for (const auto* side : {&template_.before, &template_.after}) {
      for (const int64_t id : *side)
        root.expect(id < size(), "post_processor ids below " + std::to_string(size()) + ", got " + std::to_string(id));
    }
  }

  std::vector<int64_t> encode(std::string_view text, bool add_special) const override {
    const RegexBudget budget(text.size());
    std::string valid;
    if (!is_valid_utf8(text)) text = valid = valid_utf8(text);
    std::vector<int64_t> ids;
    ids.reserve(text.size() / 3 + 4);
    if (add_special) ids = template_.before;
    added_->split(
        text, [&](int64_t id) { ids.push_back(id); },
        [&](std::string part, bool at_start) {
          Words words;
          words.ranges = {{0, part.size(), at_start}};
          words.limit = growth_limit(part.size());
          words.text = std::move(part);
          if (pre_tokenizer_) pre_tokenizer_->apply(words);
          for (const auto& range : words.ranges) bpe_.encode(words.view(range), ids);
        });
    if (add_special) ids.insert(ids.end(), template_.after.begin(), template_.after.end());
    return ids;
  }

  std::string decode(const std::vector<int64_t>& ids, bool skip_special) const override {
    const RegexBudget budget(ids.size());
    std::vector<std::string> tokens;
    tokens.reserve(ids.size());
    for (const int64_t id : ids) {
      check_id(id);
      const auto& entry = entries_[static_cast<size_t>(id)];
      if (!entry.present || (skip_special && entry.special)) continue;
      const auto normal = normal_added_.find(id);
      tokens.push_back(normal == normal_added_.end() ? entry.token : normal->second);
    }
    std::string text;
    if (decoder_) {
      size_t bytes = 0;
      for (const auto& token : tokens) bytes += token.size();
      for (const auto& part : decoder_->apply(std::move(tokens), growth_limit(bytes))) text += part;
    } else {
      for (size_t i = 0; i < tokens.size(); ++i) text += (i ? " " : "") + tokens[i];
    }
    return text;
  }

  int64_t size() const override { return static_cast<int64_t>(entries_.size()); }
  int64_t id_of(std::string_view piece) const override {
    if (const auto it = added_ids_.find(piece); it != added_ids_.end()) return it->second;
    const auto it = bpe_.vocab().find(piece);
    return it == bpe_.vocab().end() ? -1 : it->second;
  }
  std::string piece_of(int64_t id) const override {
    check_id(id);
    return entries_[static_cast<size_t>(id)].token;
  }
  int64_t bos_id() const override { return bos_id_; }
  int64_t eos_id() const override { return eos_id_; }

 private:
  struct Entry {
    std::string token;
    bool present = false, special = false;
  };

  void check_id(int64_t id) const {
    MOEGRAFT_CHECK(id >= 0 && id < size(), "token id must be in [0, ", size(), "), got ", id);
  }

  // What transformers adds to tokenizer.json: added_tokens_decoder of tokenizer_config.json in the order of its ids
  // (without it added_tokens.json), then each named special token that is no added token yet. As there the next free id
  // counts, not the written one.
  void add_configured(std::vector<AddedToken>& added, const std::filesystem::path& dir, int64_t limit) const {
    const auto config = read_tokenizer_config(dir);
    const auto place = (dir / "tokenizer_config.json").string();
    std::map<int64_t, AddedToken> wanted;
    std::vector<AddedToken> named;
    const auto name_special = [&](const nlohmann::json& value, const std::string& where) {
      if (value.is_string()) named.push_back({.content = value.get<std::string>(), .special = true});
      if (value.is_object() && value.contains("content"))
        named.push_back(read_added_token(Field(value, where), 0)), named.back().special = true;
    };
    const auto read_named = [&](const nlohmann::json& from, const std::string& where) {
      if (!from.is_object()) return;
      for (const char* key :
           {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"})
        if (from.contains(key)) name_special(from[key], where + "." + key);
      for (const char* key : {"additional_special_tokens", "extra_special_tokens"})
        if (from.contains(key) && from[key].is_array())
          for (const auto& item : from[key]) name_special(item, where + "." + key);
    };
    read_named(config, place);
    const bool decoder = config.contains("added_tokens_decoder") && config["added_tokens_decoder"].is_object();
    if (decoder) {
      for (const auto& [key, value] : config["added_tokens_decoder"].items()) {
        const Field field(value, place + ".added_tokens_decoder." + key);
        const int64_t id = std::atoll(key.c_str());
        field.expect(key == std::to_string(id) && id >= 0 && id < limit,
                     "an id below " + std::to_string(limit) + " as key");
        wanted[id] = read_added_token(field, id);
      }
    } else {
      if (const auto file = dir / "special_tokens_map.json"; std::filesystem::exists(file))
        read_named(read_json(file), file.string());
      if (const auto file = dir / "added_tokens.json"; std::filesystem::exists(file)) {
        const auto map = read_json(file);
        Field(map, file.string()).expect(map.is_object(), "an object of tokens and ids");
        for (const auto& [content, value] : map.items()) {
          const int64_t id = Field(value, file.string() + "." + content).integer(0, limit);
          const bool special =
              std::any_of(named.begin(), named.end(), [&](const AddedToken& t) { return t.content == content; });
          wanted[id] = {.id = id, .content = content, .special = special, .normalized = !special};
        }
      }
    }
    const auto known = [&](const std::string& content) {
      return std::find_if(added.begin(), added.end(), [&](const AddedToken& t) { return t.content == content; });
    };
    const auto add = [&](AddedToken token) {
      if (token.content.empty()) return;
      const bool is_named =
          std::any_of(named.begin(), named.end(), [&](const AddedToken& t) { return t.content == token.content; });
      if (const auto it = known(token.content); it != added.end()) {
        const auto flags = [](const AddedToken& t) {
          return std::array{t.special, t.normalized, t.single_word, t.lstrip, t.rstrip};
        };
        if (flags(token) == flags(*it)) return;
        token.special = token.special || is_named;
        token.id = it->id;
        *it = token;
        return;
      }
      token.special = token.special || is_named;
      const int64_t written = token.id, size = static_cast<int64_t>(bpe_.vocab().size());
      token.id = size;
      if (const auto it = bpe_.vocab().find(token.content); it != bpe_.vocab().end())
        token.id = it->second;
      else
        for (const auto& other : added) token.id = std::max(token.id, other.id + 1);
      if (written >= 0 && written != token.id)
        log::warning(dir.string(), ": the added token '", token.content, "' gets id ", token.id,
                     ", as in transformers, though the files say ", written, ": the ids before it have gaps");
      added.push_back(std::move(token));
    };
    for (const auto& [id, token] : wanted) add(token);
    for (auto token : named)
      if (known(token.content) == added.end()) token.id = -1, add(std::move(token));
  }

  void read_tokens(const Field& root, const std::filesystem::path& dir) {
    std::vector<AddedToken> added;
    int64_t largest = 0;
    for (const auto& [token, id] : bpe_.vocab()) largest = std::max<int64_t>(largest, id);
    // A typo in one id must not make a table of gigabytes.
    const auto limit = static_cast<int64_t>(bpe_.vocab().size()) * 4 + (1 << 20);
    root.at("model").at("vocab").expect(largest < limit, "ids below " + std::to_string(limit));
    if (root.has("added_tokens")) {
      for (const auto& item : root.at("added_tokens").items()) {
        auto token = read_added_token(item, item.at("id").integer(0, limit));
        // As in the package, a token that the model knows keeps the model's id.
        if (const auto it = bpe_.vocab().find(token.content); it != bpe_.vocab().end()) token.id = it->second;
        added.push_back(std::move(token));
      }
    }
    add_configured(added, dir, limit);
    for (const auto& token : added) {
      largest = std::max(largest, token.id);
      added_ids_[token.content] = token.id;
    }
    entries_.resize(static_cast<size_t>(largest) + 1);
    for (const auto& [token, id] : bpe_.vocab()) entries_[static_cast<size_t>(id)] = {token, true, false};
    for (const auto& token : added) {
      auto& entry = entries_[static_cast<size_t>(token.id)];
      root.at("added_tokens")
          .expect(!entry.present || entry.token == token.content, "one token for each id; " + std::to_string(token.id) +
                                                                      " is '" + entry.token + "' and '" +
                                                                      token.content + "'");
      entry = {token.content, true, token.special};
      if (token.normalized && normalizer_) normal_added_[token.id] = normalizer_->apply(token.content);
    }
    added_ = std::make_unique<AddedTokens>(std::move(added), normalizer_.get());
  }

  // BOS and EOS: named in tokenizer_config.json or special_tokens_map.json, or ids in the model's config.json.
  void find_ends(const std::filesystem::path& dir) {
    for (const char* name : {"tokenizer_config.json", "special_tokens_map.json", "config.json"}) {
      if (!std::filesystem::exists(dir / name)) continue;
      const auto config = read_json(dir / name);
      const auto find = [&](const char* token_key, const char* id_key, int64_t& id) {
        if (id >= 0 || !config.is_object()) return;
        if (const auto content = token_content(config, token_key); !content.empty()) id = id_of(content);
        auto it = config.find(id_key);
        if (id >= 0 || it == config.end()) return;
        const auto& value = it->is_array() && !it->empty() ? it->front() : *it;
        if (value.is_number_integer() && value >= 0 && value < size()) id = value.get<int64_t>();
      };
      find("bos_token", "bos_token_id", bos_id_);
      find("eos_token", "eos_token_id", eos_id_);
    }
  }

  Bpe bpe_;
  std::unique_ptr<Normalizer> normalizer_;
  std::unique_ptr<PreTokenizer> pre_tokenizer_;
  std::unique_ptr<TokenDecoder> decoder_;
  Template template_;
  std::unique_ptr<AddedTokens> added_;
  StringMap<int64_t> added_ids_;
  std::unordered_map<int64_t, std::string>
      normal_added_;  // tokens with `normalized` decode to their normalised text (tokenizers 0.23)
  std::vector<Entry> entries_;
  int64_t bos_id_ = -1, eos_id_ = -1;
};

}  // namespace

std::unique_ptr<Tokenizer> make_hf_tokenizer(const nlohmann::json& json, const std::filesystem::path& file) {
  return std::make_unique<HfTokenizer>(Field(json, file.string() + ""), file.parent_path());
}

}  // namespace moegraft::tokenizer
