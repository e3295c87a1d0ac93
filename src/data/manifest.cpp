#include "moegraft/data/manifest.h"

#include <algorithm>
#include <sstream>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/io/files.h"
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
  entry.segments.push_back({{}, folder / name});
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

ManifestEntry read_entry(const io::Json& json, const std::filesystem::path& folder, const std::string& where) {
  MOEGRAFT_CHECK(json.is_object(), where, ": a line must be a JSON object, got ", json.type_name());
  ManifestEntry entry;
  if (json.contains("conversations")) {
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
    MOEGRAFT_CHECK(json.contains("text") || json.contains("image"), where, ": expected \"image\" and \"text\", \"segments\" or \"conversations\", got none of them");
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
    }
  }
  MOEGRAFT_CHECK(!entry.segments.empty(), where, ": the document is empty");
  return entry;
}

}  // namespace

std::vector<ManifestEntry> read_manifest(const std::filesystem::path& path) {
  std::istringstream lines(io::read_file(path));
  std::vector<ManifestEntry> entries;
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (trim(line).empty()) continue;
    const std::string where = path.string() + ":" + std::to_string(number);
    const auto json = io::Json::parse(line, nullptr, false);
    MOEGRAFT_CHECK(!json.is_discarded(), where, ": not valid JSON: ", line.substr(0, 80));
    entries.push_back(read_entry(json, path.parent_path(), where));
    entries.back().line = number;
  }
  MOEGRAFT_CHECK(!entries.empty(), "manifest ", path.string(), " is empty: one JSON object a line is expected");
  return entries;
}

}  // namespace moegraft::data
