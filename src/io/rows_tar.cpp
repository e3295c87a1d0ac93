// WebDataset: files with one key are a sample (github.com/webdataset/webdataset, tariterators.py: base_plus_ext,
// group_by_keys).
#include <algorithm>
#include <unordered_map>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/io/image.h"
#include "row_files.h"
#include "row_readers.h"
#include "tar.h"

namespace moegraft::io {
namespace {

constexpr int64_t kMostText = 16 << 20;  // bytes of one .txt or .json: held in memory
constexpr int64_t kMostPicture = 1 << 30;

struct Sample {
  std::string key, problem;           // problem: the first one; empty: none
  std::vector<std::string> suffixes;  // of all its files
  std::vector<int64_t> pictures;      // in the store
  std::vector<std::string> texts;     // .txt, .text, .caption
  std::string json;
};

// "a/0001.left.PNG" -> a/0001, left.png. No key: names without a dot or that begin with one.
bool split_name(const std::string& name, std::string& key, std::string& suffix) {
  const size_t base = name.find_last_of('/') + 1, dot = name.find('.', base);  // npos + 1 is 0
  if (dot == std::string::npos || dot == base || dot + 1 == name.size()) return false;
  key = name.substr(0, dot), suffix = lower_case(name.substr(dot + 1));
  return true;
}

// "__init__", "__meta__/x": WebDataset's own; it passes them over too (tar_file_iterator: skip_meta).
bool is_metadata(const std::string& name) {
  const std::string base = name.substr(name.find_last_of('/') + 1);
  return (name.starts_with("__") || name.find("/__") != std::string::npos) &&
         (base.ends_with("__") || name.find("__/") != std::string::npos);
}

std::string last_suffix(const std::string& suffix) { return suffix.substr(suffix.find_last_of('.') + 1); }

class SampleReader {
 public:
  SampleReader(const std::filesystem::path& path, Rows& rows)
      : path_(path), rows_(rows), tar_(path), store_(std::make_shared<TarStore>(path, tar_)) {}

  void read() {
    while (tar_.next()) {
      if (tar_.is_folder() || is_metadata(tar_.name())) continue;
      std::string key, suffix;
      if (split_name(tar_.name(), key, suffix))
        read_member(sample_of(key), suffix);
      else
        ++rows_.open()->passed_over["without an extension"];
    }
    for (const auto& sample : samples_) {
      const std::string where = path_.string() + ": " + shortened(sample.key);
      rows_.add(where, [&] { return row_of(sample, where); });
    }
  }

 private:
  Sample& sample_of(const std::string& key) {
    const auto [at, fresh] = index_.emplace(key, samples_.size());
    if (fresh) samples_.push_back({key, {}, {}, {}, {}, {}});
    Sample& sample = samples_[at->second];
    if (!fresh && at->second + 1 != samples_.size() && sample.problem.empty())
      sample.problem =
          "its files do not follow each other: another key lies between them; pack the files in the order of their "
          "names (tar --sort=name)";
    return sample;
  }

  void read_member(Sample& sample, const std::string& suffix) {
    const auto wrong = [&](const std::string& why) {
      if (sample.problem.empty()) sample.problem = why;
    };
    if (const std::string why = tar_.strange(); !why.empty()) return wrong(shortened(tar_.name()) + " " + why);
    if (std::find(sample.suffixes.begin(), sample.suffixes.end(), suffix) != sample.suffixes.end())
      return wrong("it has two files ." + shortened(suffix, 40));
    sample.suffixes.push_back(suffix);
    const std::string kind = last_suffix(suffix);
    if (has_picture_extension("." + kind)) {
      if (tar_.size() > kMostPicture)
        return wrong(detail::concat(".", suffix, " is a picture of ", tar_.size(), " bytes, at most ", kMostPicture,
                                    " are read"));
      sample.pictures.push_back(add_picture());
    } else if (kind == "json" || kind == "txt" || kind == "text" || kind == "caption") {
      if (tar_.size() > kMostText)
        return wrong(
            detail::concat(".", suffix, " is a text of ", tar_.size(), " bytes, at most ", kMostText, " are read"));
      const std::string text = tar_.read_text(kMostText);
      if (kind != "json")
        sample.texts.push_back(text);
      else if (sample.json.empty())
        sample.json = text;
      else
        wrong("it has several .json files");
    } else {
      ++rows_.open()->passed_over["." + kind];
    }
  }

  int64_t add_picture() {
    if (!tar_.compressed()) return store_->add(tar_.name(), tar_.offset(), tar_.size(), nullptr);
    auto& spool = rows_.open()->spool;
    if (!spool) {
      spool = std::make_shared<Spool>();
      log::info(path_.string(), " is compressed: its pictures go to a temporary file, at most ",
                Spool::kMostBytes >> 30, " GiB of them");
    }
    const int64_t offset = spool->size();
    tar_.spool(*spool);
    return store_->add(tar_.name(), offset, tar_.size(), spool);
  }

  Row row_of(const Sample& sample, const std::string& where) const {
    MOEGRAFT_CHECK(sample.problem.empty(), where, ": ", sample.problem);
    MOEGRAFT_CHECK(!sample.pictures.empty(), where, ": no picture among its files (.",
                   shortened(join(sample.suffixes, ", ."), 80), ")");
    Row row;
    row.where = where, row.number = int64_t(&sample - samples_.data()) + 1;
    row.json = sample.json.empty() ? Json::object() : parse_row(sample.json, where);
    MOEGRAFT_CHECK(row.json.is_object(), where, ": its .json must be a JSON object, got ", row.json.type_name());
    Json names = Json::array();
    for (const int64_t index : sample.pictures) {
      const std::string& member = store_->member(index);
      names.push_back(member);
      for (const size_t begin : {size_t(0), member.find_last_of('/') + 1, sample.key.size() + 1})
        row.pictures[member.substr(begin)] = Picture(store_, index);
    }
    name_pictures(row, names);
    add_texts(row.json, sample.texts, where);
    return row;
  }

  // A .json may name its pictures as they were called elsewhere: where there is one, it is meant.
  static void name_pictures(Row& row, const Json& names) {
    Json& json = row.json;
    const bool chat = json.contains("conversations") || json.contains("messages");
    const bool one = names.size() == 1;
    if (json.contains("segments")) return;
    if (chat) {
      if (!json.contains("image") && !json.contains("images"))
        json["images"] = names;
      else if (one && json.contains("image"))
        json["image"] = names[0];
      else if (one && json["images"].is_array() && json["images"].size() == 1)
        json["images"] = names;
      return;
    }
    MOEGRAFT_CHECK(
        one || json.contains("image") || json.contains("images") || json.contains("file_name"), row.where, ": it has ",
        names.size(),
        " pictures, and no .json with \"image\", \"segments\" or \"messages\" says which one or where each belongs");
    if (one) json.erase("file_name"), json.erase("images"), json["image"] = names[0];
  }

  // The first text is the caption, what the .json says besides another one (img2dataset writes the same into both).
  static void add_texts(Json& json, const std::vector<std::string>& texts, const std::string& where) {
    if (texts.empty()) return;
    std::vector<Json> others;
    for (const auto& text : texts) check_utf8(text, where);
    for (size_t i = 1; i < texts.size(); ++i) others.push_back(trim(texts[i]));
    for (const char* key : {"text", "caption"})
      if (json.contains(key)) others.push_back(json[key]), json.erase(key);
    json["text"] = trim(texts.front());
    if (json.contains("captions") && json["captions"].is_array())
      others.insert(others.end(), json["captions"].begin(), json["captions"].end());
    else if (json.contains("captions"))
      return;  // refused by who reads it
    if (!others.empty()) json["captions"] = others;
  }

  std::filesystem::path path_;
  Rows& rows_;
  TarReader tar_;
  std::shared_ptr<TarStore> store_;
  std::vector<Sample> samples_;
  std::unordered_map<std::string, size_t> index_;
};

}  // namespace

void read_tar(const std::filesystem::path& path, Rows& rows) { SampleReader(path, rows).read(); }

}  // namespace moegraft::io
