#include "moegraft/data/manifest.h"

#include <algorithm>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/io/image.h"
#include "moegraft/io/rows.h"

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

void add_image(ManifestEntry& entry, const io::Row& row, const std::string& name) { entry.segments.push_back({{}, row.picture(name)}); }

// Keys that mean something, and what stands for them elsewhere.
const std::vector<std::string>& known_keys() {
  static const std::vector<std::string> keys{"image", "images", "file_name", "text", "caption", "captions", "segments", "conversations", "messages"};
  return keys;
}

bool is_picture(const io::Row& row, const io::Json& value) {
  if (!value.is_string()) return false;
  if (row.pictures.contains(value.get_ref<const std::string&>())) return true;
  const auto& text = value.get_ref<const std::string&>();
  return lower_case(text.substr(0, 11)) == "data:image/" || io::has_picture_extension(text);
}

// Where a key stands for another: {"file_name": …} reads as {"image": …}. A key that is nearly one of ours, or that holds the picture a document lacks, is not passed over.
io::Json with_our_keys(const io::Row& row) {
  io::Json json = row.json;
  const std::string& where = row.where;
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
    MOEGRAFT_CHECK(pictures || !is_picture(row, value), where, ": \"", shortened(key), "\" holds a picture, which is read from \"image\" or \"file_name\" only: rename it");
  }
  return json;
}

// Chat messages: the pictures among their parts, in order; the turns' texts joined by line ends, without roles.
void read_messages(ManifestEntry& entry, const io::Json& json, const io::Row& row, const std::string& where) {
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
      add_image(entry, row, key ? string_at(part, key, where) : listed[next++]);
    }
  }
  MOEGRAFT_CHECK(next == 0 || next == listed.size(), where, ": ", next, " image parts for ", listed.size(), " images");
}

// The turns are joined by line ends; each placeholder takes the next image, images without one come first.
void read_conversation(ManifestEntry& entry, const io::Json& json, const io::Row& row, const std::string& where) {
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
    while (next < images.size()) add_image(entry, row, images[next++]);
  for (size_t begin = 0; begin <= text.size();) {
    const size_t at = text.find(kPlaceholder, begin);
    add_text(entry, text.substr(begin, at == std::string::npos ? at : at - begin));
    if (at == std::string::npos) break;
    add_image(entry, row, images[next++]);
    begin = at + kPlaceholder.size();
  }
}

ManifestEntry read_entry(const io::Row& row) {
  const std::string& where = row.where;
  MOEGRAFT_CHECK(row.json.is_object(), where, ": a line must be a JSON object, got ", row.json.type_name());
  const io::Json json = with_our_keys(row);
  ManifestEntry entry;
  entry.line = row.number;
  if (json.contains("messages")) {
    read_messages(entry, json, row, where);
  } else if (json.contains("conversations")) {
    read_conversation(entry, json, row, where);
  } else if (json.contains("segments")) {
    MOEGRAFT_CHECK(json["segments"].is_array(), where, ": \"segments\" must be a list");
    for (const auto& segment : json["segments"]) {
      const bool text = segment.is_object() && segment.contains("text"), image = segment.is_object() && segment.contains("image");
      MOEGRAFT_CHECK(text != image, where, ": a segment must be {\"text\": …} or {\"image\": …}");
      if (text)
        add_text(entry, string_at(segment, "text", where));
      else
        add_image(entry, row, string_at(segment, "image", where));
    }
  } else {
    MOEGRAFT_CHECK(json.contains("text") || json.contains("image"), where, ": expected \"image\" and \"text\", \"segments\", \"messages\" or \"conversations\", got none of them");
    const std::string text = json.contains("text") ? string_at(json, "text", where) : "";
    add_text(entry, text);
    if (json.contains("image")) {
      add_image(entry, row, string_at(json, "image", where));
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

std::vector<ManifestEntry> read_manifest(const std::filesystem::path& path, const BadRow& bad) {
  std::vector<ManifestEntry> entries;
  io::read_rows(path, [&](const io::Row& row) { entries.push_back(read_entry(row)); }, bad);
  MOEGRAFT_CHECK(!entries.empty(), "manifest ", path.string(), " has no document that can be read: one JSON object a line is expected, an ImageFolder, a tar (WebDataset), or a Parquet or Arrow file (Hugging Face)");
  return entries;
}

}  // namespace moegraft::data
