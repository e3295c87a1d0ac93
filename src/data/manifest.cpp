#include "moegraft/data/manifest.h"

#include <algorithm>
#include <cctype>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"

namespace moegraft::data {
namespace {

constexpr std::string_view kPlaceholder = "<image>";

std::string string_at(const io::Json& json, const char* key, const std::string& where) {
  MOEGRAFT_CHECK(json.at(key).is_string(), where, ": \"", key, "\" must be a string, got ", json.at(key).type_name());
  return json.at(key).get<std::string>();
}

void add_text(ManifestEntry& entry, const std::string& text) {
  if (text.empty()) return;
  if (!entry.segments.empty() && !entry.segments.back().is_image())
    entry.segments.back().text += text;
  else
    entry.segments.push_back({text, {}});
}

void add_image(ManifestEntry& entry, const std::filesystem::path& folder, const std::string& name, const std::string& where) {
  MOEGRAFT_CHECK(!name.empty(), where, ": an image path is empty");
  MOEGRAFT_CHECK(!name.starts_with("data:"), where, ": the picture is in the manifest itself (", shortened(name, 40), "); write it to a file and name that");
  MOEGRAFT_CHECK(!name.starts_with("http://") && !name.starts_with("https://"), where, ": ", shortened(name), " is an address; load the picture and name the file");
  const std::filesystem::path file = folder / name;
  std::error_code error;
  MOEGRAFT_CHECK(std::filesystem::is_regular_file(file, error), where, ": image not found: ", file.string());
  entry.segments.push_back({{}, file});
}

// Keys that mean something, and what stands for them elsewhere.
const std::vector<std::string>& known_keys() {
  static const std::vector<std::string> keys{"image", "images", "file_name", "text", "caption", "captions", "segments", "conversations", "messages"};
  return keys;
}

bool is_picture_name(const io::Json& value) {
  if (!value.is_string()) return false;
  std::string start = value.get<std::string>().substr(0, 11);
  std::transform(start.begin(), start.end(), start.begin(), [](unsigned char c) { return char(std::tolower(c)); });
  return start == "data:image/" || io::has_picture_extension(value.get_ref<const std::string&>());
}

// Where a key stands for another: {"file_name": …} reads as {"image": …}. A key that is nearly one of ours, or that holds the picture a document lacks, is not passed over.
io::Json with_our_keys(io::Json json, const std::string& where) {
  for (const auto& [theirs, ours] : {std::pair("file_name", "image"), std::pair("caption", "text")})
    if (json.contains(theirs) && !json.contains(ours)) json[ours] = json[theirs];
  const auto& known = known_keys();
  const bool pictures = json.contains("image") || json.contains("images") || json.contains("segments") || json.contains("messages");
  for (const auto& [key, value] : json.items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    std::vector<std::string> alike;
    for (const auto& k : known)
      if (key.size() > 3 && key[0] == k[0] && key.size() + 1 >= k.size() && key.size() <= k.size() + 1) alike.push_back(k);
    const std::string near = nearest_word(key, alike);
    MOEGRAFT_CHECK(near.empty(), where, ": unknown key \"", shortened(key), "\"; did you mean \"", near, "\"?");
    MOEGRAFT_CHECK(pictures || !is_picture_name(value), where, ": \"", shortened(key), "\" holds a picture, which is read from \"image\" or \"file_name\" only: rename it");
  }
  return json;
}

// Chat messages: the pictures among their parts, in order; the turns' texts joined by line ends, without roles.
void read_messages(ManifestEntry& entry, const io::Json& json, const std::filesystem::path& folder, const std::string& where) {
  std::vector<std::string> listed;  // parts may point into a list beside them
  if (json.contains("images")) {
    MOEGRAFT_CHECK(json["images"].is_array(), where, ": \"images\" must be a list");
    for (const auto& image : json["images"]) {
      MOEGRAFT_CHECK(image.is_string(), where, ": \"images\" must hold strings, got ", image.type_name());
      listed.push_back(image.get<std::string>());
    }
  }
  size_t next = 0;
  MOEGRAFT_CHECK(json["messages"].is_array(), where, ": \"messages\" must be a list");
  for (const auto& turn : json["messages"]) {
    MOEGRAFT_CHECK(turn.is_object() && turn.contains("content"), where, ": a message must be {\"role\": …, \"content\": …}");
    if (!entry.segments.empty()) add_text(entry, "\n");
    if (turn["content"].is_string()) {
      add_text(entry, turn["content"].get<std::string>());
      continue;
    }
    MOEGRAFT_CHECK(turn["content"].is_array(), where, ": a message's content must be a string or a list of parts");
    for (const auto& part : turn["content"]) {
      MOEGRAFT_CHECK(part.is_object() && part.contains("type") && part["type"].is_string(), where, ": a part of a message must have a type, text or image");
      const auto type = part["type"].get<std::string>();
      if (type == "text") {
        MOEGRAFT_CHECK(part.contains("text"), where, ": a part of type text must have a text");
        add_text(entry, string_at(part, "text", where));
        continue;
      }
      MOEGRAFT_CHECK(type == "image", where, ": a part of a message must be of type text or image, got ", shortened(type));
      const char* key = part.contains("image") ? "image" : part.contains("path") ? "path" : nullptr;
      MOEGRAFT_CHECK(key || next < listed.size(), where, ": a part of type image names no picture, and \"images\" holds ", listed.size());
      add_image(entry, folder, key ? string_at(part, key, where) : listed[next++], where);
    }
  }
  MOEGRAFT_CHECK(next == 0 || next == listed.size(), where, ": ", next, " image parts for ", listed.size(), " images");
}

// The turns are joined by line ends; each placeholder takes the next image, images without one come first.
void read_conversation(ManifestEntry& entry, const io::Json& json, const std::filesystem::path& folder, const std::string& where) {
  std::vector<std::string> images;
  if (json.contains("image")) images.push_back(string_at(json, "image", where));
  if (json.contains("images")) {
    MOEGRAFT_CHECK(json["images"].is_array(), where, ": \"images\" must be a list");
    for (const auto& image : json["images"]) {
      MOEGRAFT_CHECK(image.is_string(), where, ": \"images\" must hold strings, got ", image.type_name());
      images.push_back(image.get<std::string>());
    }
  }
  MOEGRAFT_CHECK(json["conversations"].is_array(), where, ": \"conversations\" must be a list");
  std::string text;
  for (const auto& turn : json["conversations"]) {
    MOEGRAFT_CHECK(turn.is_object() && turn.contains("value"), where, ": a conversation turn must be {\"from\": …, \"value\": …}");
    text += (text.empty() ? "" : "\n") + string_at(turn, "value", where);
  }
  size_t placeholders = 0;
  for (size_t at = text.find(kPlaceholder); at != std::string::npos; at = text.find(kPlaceholder, at + 1)) ++placeholders;
  MOEGRAFT_CHECK(placeholders == 0 || placeholders == images.size(), where, ": ", placeholders, " <image> placeholders for ", images.size(), " image(s)");
  size_t next = 0;
  if (placeholders == 0)
    while (next < images.size()) add_image(entry, folder, images[next++], where);
  for (size_t begin = 0; begin <= text.size();) {
    const size_t at = text.find(kPlaceholder, begin);
    add_text(entry, text.substr(begin, at == std::string::npos ? at : at - begin));
    if (at == std::string::npos) break;
    add_image(entry, folder, images[next++], where);
    begin = at + kPlaceholder.size();
  }
}

ManifestEntry read_entry(const io::Json& line, const std::filesystem::path& folder, const std::string& where) {
  MOEGRAFT_CHECK(line.is_object(), where, ": a line must be a JSON object, got ", line.type_name());
  const io::Json json = with_our_keys(line, where);
  ManifestEntry entry;
  if (json.contains("messages")) {
    read_messages(entry, json, folder, where);
  } else if (json.contains("conversations")) {
    read_conversation(entry, json, folder, where);
  } else if (json.contains("segments")) {
    MOEGRAFT_CHECK(json["segments"].is_array(), where, ": \"segments\" must be a list");
    for (const auto& segment : json["segments"]) {
      const bool text = segment.is_object() && segment.contains("text"), image = segment.is_object() && segment.contains("image");
      MOEGRAFT_CHECK(text != image, where, ": a segment must be {\"text\": …} or {\"image\": …}");
      if (text)
        add_text(entry, string_at(segment, "text", where));
      else
        add_image(entry, folder, string_at(segment, "image", where), where);
    }
  } else {
    MOEGRAFT_CHECK(json.contains("text") || json.contains("image"), where, ": expected \"image\" and \"text\", \"segments\", \"messages\" or \"conversations\", got none of them");
    const std::string text = json.contains("text") ? string_at(json, "text", where) : "";
    add_text(entry, text);
    if (json.contains("image")) {
      add_image(entry, folder, string_at(json, "image", where), where);
      if (!text.empty()) entry.captions.push_back(text);
      if (json.contains("captions")) {
        MOEGRAFT_CHECK(json["captions"].is_array(), where, ": \"captions\" must be a list of strings");
        for (const auto& caption : json["captions"]) {
          MOEGRAFT_CHECK(caption.is_string(), where, ": \"captions\" must be a list of strings, got ", caption.type_name());
          const auto value = caption.get<std::string>();
          if (!value.empty() && std::find(entry.captions.begin(), entry.captions.end(), value) == entry.captions.end()) entry.captions.push_back(value);
        }
        if (text.empty() && !entry.captions.empty()) entry.segments.insert(entry.segments.begin(), {entry.captions.front(), {}});
      }
      MOEGRAFT_CHECK(!entry.captions.empty(), where, ": the picture has no text");
    }
  }
  MOEGRAFT_CHECK(!entry.segments.empty(), where, ": the document is empty");
  return entry;
}

}  // namespace

namespace {

class Rows {
 public:
  Rows(std::vector<ManifestEntry>& entries, const BadRow& bad) : entries_(entries), bad_(bad) {}
  void add(const std::filesystem::path& file, int64_t number, const std::function<io::Json()>& read) {
    const std::string where = file.string() + ":" + std::to_string(number);
    try {
      entries_.push_back(read_entry(read(), file.parent_path(), where));
      entries_.back().line = number;
    } catch (const io::Json::exception& e) {
      std::string what = e.what();
      if (const size_t cut = what.find("] "); cut != std::string::npos) what = what.substr(cut + 2);
      refuse(where + ": not valid JSON: " + shortened(what, 160));
    } catch (const UserError& e) {
      refuse(e.what());
    }
  }

 private:
  void refuse(const std::string& why) const {
    if (!bad_) fail<UserError>(why);
    bad_(why);
  }
  std::vector<ManifestEntry>& entries_;
  const BadRow& bad_;
};

// What makes an ImageFolder, in a folder NEW, of a table with a column "image".
std::string as_image_folder(const char* loader, const std::filesystem::path& path) {
  return moegraft::detail::concat("; make it files: python -c \"import datasets; d = datasets.", loader, "('", path.string(), "'); n = [f'{i}.png' for i in range(len(d))]; ",
                                  "[r['image'].save('NEW/' + f) for r, f in zip(d, n)]; d.remove_columns('image').add_column('file_name', n).to_json('NEW/metadata.jsonl')\"");
}

std::string_view without_byte_order_mark(std::string_view text) { return text.starts_with("\xEF\xBB\xBF") ? text.substr(3) : text; }

void read_lines(const std::filesystem::path& path, Rows& rows) {
  const std::string text = io::read_file(path);
  std::string_view rest = without_byte_order_mark(text);
  const size_t first = rest.find_first_not_of(" \t\r\n");
  MOEGRAFT_CHECK(first == std::string_view::npos || rest[first] != '[', path.string(), " is one JSON list; one object a line is expected (JSONL): jq -c '.[]' ", path.string(), " > NEW.jsonl");
  MOEGRAFT_CHECK(!rest.starts_with("PAR1"), path.string(), " is a Parquet file", as_image_folder("Dataset.from_parquet", path));
  MOEGRAFT_CHECK(!rest.starts_with("ARROW1") && path.extension() != ".arrow", path.string(), " is an Arrow file", as_image_folder("Dataset.from_file", path));
  for (int64_t number = 1; !rest.empty(); ++number) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const std::string line = trim(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.empty()) continue;
    rows.add(path, number, [&] {
      MOEGRAFT_CHECK(json_depth(line) <= kMostJsonDepth, path.string(), ":", number, ": brackets nest too deep");
      return io::Json::parse(line);
    });
  }
}

// Fields of a row of comma-separated values: quotes may hold commas, line ends and doubled quotes (RFC 4180).
std::vector<std::string> read_csv_row(std::string_view& rest, const std::string& where) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (; !rest.empty(); rest.remove_prefix(1)) {
    const char c = rest[0];
    if (quoted) {
      if (c != '"') fields.back() += c;
      else if (rest.size() > 1 && rest[1] == '"') fields.back() += '"', rest.remove_prefix(1);
      else quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == ',') {
      fields.emplace_back();
    } else if (c == '\n') {
      rest.remove_prefix(1);
      break;
    } else if (c != '\r') {
      fields.back() += c;
    }
  }
  MOEGRAFT_CHECK(!quoted, where, ": a quote opens in this row and never closes: where the next row begins cannot be told");
  return fields;
}

void read_csv(const std::filesystem::path& path, Rows& rows) {
  const std::string text = io::read_file(path);
  std::string_view rest = without_byte_order_mark(text);
  const auto keys = read_csv_row(rest, path.string() + ":1");
  for (int64_t number = 2; !rest.empty(); ++number) {
    const auto fields = read_csv_row(rest, path.string() + ":" + std::to_string(number));
    if (fields.size() == 1 && trim(fields[0]).empty()) continue;
    rows.add(path, number, [&] {
      MOEGRAFT_CHECK(fields.size() == keys.size(), path.string(), ":", number, ": ", fields.size(), " fields, the first row names ", keys.size());
      io::Json row = io::Json::object();
      for (size_t i = 0; i < keys.size(); ++i) row[keys[i]] = fields[i];
      return row;
    });
  }
}

// A folder for each label, which is the text of its pictures. A picture beside these folders has none.
void read_labels(const std::filesystem::path& folder, Rows& rows) {
  std::vector<std::filesystem::path> pictures;
  const auto take = [&](const std::filesystem::path& file) {
    const std::string extension = file.extension().string();
    MOEGRAFT_CHECK(extension != ".arrow" && extension != ".parquet", folder.string(), " is a data set of ", file.filename().string(),
                   extension == ".arrow" ? as_image_folder("load_from_disk", file.parent_path()) : as_image_folder("Dataset.from_parquet", file));
    if (io::has_picture_extension(file.filename().string())) pictures.push_back(file.lexically_relative(folder));
  };
  for (const auto& item : std::filesystem::directory_iterator(folder)) {
    if (!item.is_directory()) {
      take(item.path());
      continue;
    }
    for (const auto& inner : std::filesystem::directory_iterator(item)) {
      const std::string name = inner.path().filename().string();
      MOEGRAFT_CHECK(!inner.is_directory() && name != "metadata.jsonl" && name != "metadata.csv", folder.string(), " holds ImageFolders (splits?), not a folder for each label: name one of them, such as ",
                     item.path().string());
      take(inner.path());
    }
  }
  std::sort(pictures.begin(), pictures.end());
  int64_t number = 0;
  for (const auto& picture : pictures) rows.add(folder / "(pictures)", ++number, [&] { return io::Json{{"image", picture.string()}, {"text", picture.parent_path().string()}}; });
}

}  // namespace

std::vector<ManifestEntry> read_manifest(const std::filesystem::path& path, const BadRow& bad) {
  std::vector<ManifestEntry> entries;
  Rows rows(entries, bad);
  const std::string extension = path.extension().string();
  MOEGRAFT_CHECK(extension != ".tar" && !path.string().ends_with(".tar.gz") && extension != ".tgz", path.string(), " is an archive (WebDataset?); unpack it and name its files in a JSONL manifest");
  if (!std::filesystem::is_directory(path)) {
    if (extension == ".csv") read_csv(path, rows);
    else read_lines(path, rows);
  } else if (std::filesystem::exists(path / "metadata.jsonl")) {
    read_lines(path / "metadata.jsonl", rows);
  } else if (std::filesystem::exists(path / "metadata.csv")) {
    read_csv(path / "metadata.csv", rows);
  } else {
    read_labels(path, rows);
  }
  MOEGRAFT_CHECK(!entries.empty(), "manifest ", path.string(), " has no document that can be read: one JSON object a line is expected, or an ImageFolder");
  return entries;
}

}  // namespace moegraft::data
