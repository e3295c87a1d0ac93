#include "moegraft/data/manifest.h"

#include <algorithm>
#include <set>
#include <tuple>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
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

// Text, not the name under which a row's own bytes are found.
std::string text_at(const io::Row& row, const io::Json& json, const char* key) {
  std::string text = string_at(json, key, row.where);
  MOEGRAFT_CHECK(!row.pictures.contains(text), row.where, ": \"", key,
                 "\" is a column of bytes, expected text: cast it to string (pyarrow: column.cast(\"string\"))");
  return text;
}

void add_text(ManifestEntry& entry, const std::string& text) {
  if (text.empty()) return;
  if (!entry.segments.empty() && !entry.segments.back().is_image())
    entry.segments.back().text += text;
  else
    entry.segments.push_back({text, {}});
}

void add_image(ManifestEntry& entry, const io::Row& row, const std::string& name) {
  entry.segments.push_back({{}, row.picture(name)});
}

// What a key of a row is for. A document needs one that names a picture, or text, or both in one.
enum class Role { picture, text, whole };
const std::vector<std::pair<std::string, Role>>& known_keys() {
  static const std::vector<std::pair<std::string, Role>> keys{
      {"image", Role::picture},  {"images", Role::picture},      {"file_name", Role::picture},
      {"text", Role::text},      {"caption", Role::text},        {"captions", Role::text},
      {"segments", Role::whole}, {"conversations", Role::whole}, {"messages", Role::whole}};
  return keys;
}

bool is_address(const std::string& text) { return text.starts_with("http://") || text.starts_with("https://"); }

bool is_picture(const io::Row& row, const io::Json& value) {
  if (value.is_array())
    return std::any_of(value.begin(), value.end(), [&](const io::Json& inner) { return is_picture(row, inner); });
  if (value.is_object())
    return value.contains("path") && is_picture(row, value["path"]);  // as datasets writes pictures
  if (!value.is_string()) return false;
  const auto& text = value.get_ref<const std::string&>();
  return row.pictures.contains(text) || lower_case(text.substr(0, 11)) == "data:image/" ||
         io::has_picture_extension(text);
}

std::string keys_of(const io::Json& json) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back('"' + shortened(key, 40) + '"');
  return keys.empty() ? "nothing" : shortened(join(keys, ", "), 200);
}

bool has_image_parts(const io::Json& json) {
  const auto any = [](const io::Json& list, const auto& is) {
    return list.is_array() && std::any_of(list.begin(), list.end(), is);
  };
  return json.contains("messages") && any(json["messages"], [&](const io::Json& turn) {
           return turn.is_object() && turn.contains("content") && any(turn["content"], [](const io::Json& part) {
                    return part.is_object() && part.contains("type") && part["type"] == "image";
                  });
         });
}

// Where a key stands for another: {"file_name": …} reads as {"image": …}. A key that is nearly the one that a document
// lacks, or that holds the picture it lacks, is not passed over.
io::Json with_our_keys(const io::Row& row, const ManifestColumns& columns, std::set<std::string>& passed_over) {
  io::Json json = row.json;
  const std::string& where = row.where;
  for (const auto& [theirs, ours, option] :
       {std::tuple(columns.image, "image", "--image-column"), std::tuple(columns.text, "text", "--text-column")}) {
    if (theirs.empty()) continue;
    MOEGRAFT_CHECK(json.contains(theirs), where, ": has no \"", theirs, "\" (", option, "), it has ",
                   keys_of(row.json));
    json[ours] = json[theirs];
  }
  for (const auto& [theirs, ours] : {std::pair("file_name", "image"), std::pair("caption", "text")})
    if (json.contains(theirs) && !json.contains(ours)) json[ours] = json[theirs];
  // Both: the caption is one more.
  if (columns.text.empty() && row.json.contains("caption") && row.json.contains("text") &&
      (!json.contains("captions") || json["captions"].is_array()))
    for (const auto& caption :
         row.json["caption"].is_array() ? row.json["caption"] : io::Json::array({row.json["caption"]}))
      json["captions"].push_back(caption);
  const auto& known = known_keys();
  const auto has = [&](Role role) {
    return std::any_of(known.begin(), known.end(),
                       [&](const auto& k) { return k.second == role && json.contains(k.first); });
  };
  const bool pictures = has(Role::picture) || json.contains("segments") || has_image_parts(json),
             texts = has(Role::text) || has(Role::whole);
  for (const auto& [key, value] : json.items()) {
    if (std::any_of(known.begin(), known.end(), [&](const auto& k) { return k.first == key; })) continue;
    std::vector<std::string> alike;
    for (const auto& [k, role] : known) {
      const bool lacked = k == "captions"         ? !json.contains(k)
                          : role == Role::picture ? !pictures
                          : role == Role::text    ? !texts
                                                  : !has(Role::whole) && (!pictures || !texts);
      if (lacked && key.size() > 3 && key[0] == k[0] && key.size() + 1 >= k.size() && key.size() <= k.size() + 1)
        alike.push_back(k);
    }
    const std::string near = nearest_word(key, alike);
    MOEGRAFT_CHECK(near.empty(), where, ": unknown key \"", shortened(key), "\"; did you mean \"", near, "\"?");
    if (!is_picture(row, value)) continue;
    if (pictures) {
      if (value.is_string() && row.pictures.contains(value.get<std::string>())) passed_over.insert(key);
      continue;
    }
    MOEGRAFT_CHECK(!value.is_string() || !is_address(value.get<std::string>()), where, ": \"", shortened(key),
                   "\" is the address of a picture; load the pictures, and name the files in \"image\"");
    fail(where, ": \"", shortened(key),
         "\" holds a picture, which is read from \"image\" or \"file_name\": rename it, or give --image-column ", key);
  }
  return json;
}

// The pictures that a row lists beside its text: "image", then "images", each one or a list.
std::vector<std::string> listed_pictures(const io::Json& json, const std::string& where) {
  std::vector<std::string> pictures;
  for (const char* key : {"image", "images"}) {
    if (!json.contains(key) || json[key].is_null()) continue;
    const bool one = json[key].is_string();
    MOEGRAFT_CHECK(one || json[key].is_array(), where, ": \"", key, "\" must be a string, or a list of strings, got ",
                   json[key].type_name());
    for (const auto& item : one ? io::Json::array({json[key]}) : json[key]) {
      MOEGRAFT_CHECK(item.is_string(), where, ": \"", key, "\" must hold strings, got ", item.type_name());
      MOEGRAFT_CHECK(item != "", where, ": an image path is empty");
      pictures.push_back(item.get<std::string>());
    }
  }
  return pictures;
}

size_t count_placeholders(const std::string& text) {
  size_t count = 0;
  for (size_t at = text.find(kPlaceholder); at != std::string::npos; at = text.find(kPlaceholder, at + 1)) ++count;
  return count;
}

// A text's parts, with a picture in the place of each placeholder.
void fill_in(ManifestEntry& entry, const std::string& text, const io::Row& row,
             const std::vector<std::string>& pictures, size_t& next) {
  for (size_t begin = 0;;) {
    const size_t at = text.find(kPlaceholder, begin);
    add_text(entry, text.substr(begin, at == std::string::npos ? at : at - begin));
    if (at == std::string::npos) return;
    add_image(entry, row, pictures.at(next++));
    begin = at + kPlaceholder.size();
  }
}

// A segment may say which modality its picture is of, where a data set holds several.
void add_segment_image(ManifestEntry& entry, const io::Json& segment, const io::Row& row) {
  add_image(entry, row, string_at(segment, "image", row.where));
  if (!segment.contains("modality")) return;
  entry.segments.back().modality = string_at(segment, "modality", row.where);
  MOEGRAFT_CHECK(!entry.segments.back().modality.empty(), row.where,
                 ": a segment's \"modality\" is empty; leave it out, or name one");
}

// Every picture that is listed has its place, or none has: then they come before (or, for a caption, behind) the text.
bool places_of(size_t places, size_t pictures, const std::string& where) {
  MOEGRAFT_CHECK(places == 0 || places == pictures, where, ": ", places,
                 " places for pictures (<image>, or parts of type image), and ", pictures,
                 " picture(s) in \"image\" or \"images\"");
  return places > 0;
}

// Turns of a conversation, or of chat messages whose contents are strings or lists of parts: joined by line ends,
// without roles. Each placeholder or part that names no picture takes the next one that is listed; listed ones without
// a place come first.
void read_turns(ManifestEntry& entry, const io::Json& turns, const char* key, const io::Json& json,
                const io::Row& row) {
  const std::string& where = row.where;
  const bool messages = std::string_view(key) == "content";
  MOEGRAFT_CHECK(turns.is_array(), where, ": \"", messages ? "messages" : "conversations", "\" must be a list");
  const auto pictures = listed_pictures(json, where);
  struct Part {
    bool image;
    std::string value;  // of an image: its name, empty: the next that is listed
  };
  std::vector<std::vector<Part>> parts;
  size_t named = 0, places = 0, in_text = 0;
  for (const auto& turn : turns) {
    MOEGRAFT_CHECK(turn.is_object() && turn.contains(key), where,
                   messages ? ": a message must be {\"role\": …, \"content\": …}"
                            : ": a conversation turn must be {\"from\": …, \"value\": …}");
    auto& of_turn = parts.emplace_back();
    if (!messages || turn[key].is_string()) {
      of_turn.push_back({false, text_at(row, turn, key)});
    } else {
      MOEGRAFT_CHECK(turn[key].is_array(), where, ": a message's content must be a string or a list of parts");
      for (const auto& part : turn[key]) {
        MOEGRAFT_CHECK(part.is_object() && part.contains("type") && part["type"].is_string(), where,
                       ": a part of a message must have a type, text or image");
        const auto type = part["type"].get<std::string>();
        if (type == "text") {
          MOEGRAFT_CHECK(part.contains("text"), where, ": a part of type text must have a text");
          of_turn.push_back({false, text_at(row, part, "text")});
          continue;
        }
        MOEGRAFT_CHECK(type == "image", where,
                       ": a part of a message must be {\"type\": \"text\", \"text\": …} or {\"type\": \"image\", "
                       "\"image\": \"a.png\"}, got the type ",
                       shortened(type));
        const char* name = part.contains("image") ? "image" : part.contains("path") ? "path" : nullptr;
        of_turn.push_back({true, name ? string_at(part, name, where) : std::string()});
        MOEGRAFT_CHECK(!name || !of_turn.back().value.empty(), where, ": an image path is empty");
        ++(name ? named : places);
      }
    }
    for (const auto& part : of_turn)
      if (!part.image) in_text += count_placeholders(part.value);
  }
  // Text beside pictures that parts name may well speak of "<image>".
  const bool fills = named == 0 && places == 0;
  const bool placed = places_of(places + (fills ? in_text : 0), pictures.size(), where);
  size_t next = 0;
  if (!placed)
    for (const auto& picture : pictures) add_image(entry, row, picture);
  bool first = true;
  for (const auto& of_turn : parts) {
    if (!first) add_text(entry, "\n");
    first = false;
    for (const auto& part : of_turn) {
      if (part.image)
        add_image(entry, row, part.value.empty() ? pictures.at(next++) : part.value);
      else if (fills)
        fill_in(entry, part.value, row, pictures, next);
      else
        add_text(entry, part.value);
    }
  }
}

// A text, and pictures behind it or where it has placeholders.
void read_captioned(ManifestEntry& entry, const io::Json& json, const io::Row& row) {
  const std::string& where = row.where;
  const auto pictures = listed_pictures(json, where);
  const bool several = json.contains("text") && json["text"].is_array();  // captions by another name
  const std::string text =
      json.contains("text") && !several && !json["text"].is_null() ? text_at(row, json, "text") : "";
  MOEGRAFT_CHECK(!pictures.empty() || !(json.contains("image") || json.contains("images")), where,
                 ": the document's picture is missing: ", json.contains("image") ? "\"image\" is " : "\"images\" is ",
                 json[json.contains("image") ? "image" : "images"].dump());
  if (pictures.empty()) {
    MOEGRAFT_CHECK(!several, where, ": a \"text\" without a picture must be a string, got array");
    return add_text(entry, text);
  }
  if (places_of(count_placeholders(text), pictures.size(), where)) {
    MOEGRAFT_CHECK(!json.contains("captions"), where,
                   ": \"captions\" do not go with a text that says where its pictures stand (<image>): leave one out");
    size_t next = 0;
    return fill_in(entry, text, row, pictures, next);
  }
  if (!text.empty()) entry.captions.push_back(text);
  for (const char* key : {"text", "captions"}) {
    if (!json.contains(key) || (std::string_view(key) == "text" && !several)) continue;
    MOEGRAFT_CHECK(json[key].is_array(), where, ": \"", key, "\" must be a list of strings");
    for (const auto& caption : json[key]) {
      MOEGRAFT_CHECK(caption.is_string(), where, ": \"", key, "\" must be a list of strings, got ",
                     caption.type_name());
      const auto value = caption.get<std::string>();
      if (!value.empty() && std::find(entry.captions.begin(), entry.captions.end(), value) == entry.captions.end())
        entry.captions.push_back(value);
    }
  }
  MOEGRAFT_CHECK(!entry.captions.empty(), where,
                 ": the picture has no text: expected a \"text\", \"caption\" or \"captions\" (or --text-column NAME), "
                 "the row has ",
                 keys_of(row.json));
  add_text(entry, entry.captions.front());
  for (const auto& picture : pictures) add_image(entry, row, picture);
}

ManifestEntry read_entry(const io::Row& row, const ManifestColumns& columns, std::set<std::string>& passed_over) {
  const std::string& where = row.where;
  MOEGRAFT_CHECK(row.json.is_object(), where, ": a line must be a JSON object, got ", row.json.type_name());
  const io::Json json = with_our_keys(row, columns, passed_over);
  ManifestEntry entry;
  entry.line = row.number;
  if (json.contains("messages")) {
    read_turns(entry, json["messages"], "content", json, row);
  } else if (json.contains("conversations")) {
    read_turns(entry, json["conversations"], "value", json, row);
  } else if (json.contains("segments")) {
    MOEGRAFT_CHECK(json["segments"].is_array(), where, ": \"segments\" must be a list");
    MOEGRAFT_CHECK(!json.contains("image") && !json.contains("images"), where,
                   ": \"segments\" says what the document holds; leave \"", json.contains("image") ? "image" : "images",
                   "\" out");
    for (const auto& segment : json["segments"]) {
      const bool text = segment.is_object() && segment.contains("text"),
                 image = segment.is_object() && segment.contains("image");
      MOEGRAFT_CHECK(text != image, where, ": a segment must be {\"text\": …} or {\"image\": …}");
      for (const auto& [key, value] : segment.items())
        MOEGRAFT_CHECK(key == "image" || !is_picture(row, value), where, ": a segment holds a picture under \"",
                       shortened(key), "\"; a segment is {\"text\": …} or {\"image\": …}");
      if (text)
        add_text(entry, text_at(row, segment, "text"));
      else
        add_segment_image(entry, segment, row);
    }
  } else {
    MOEGRAFT_CHECK(json.contains("text") || json.contains("image") || json.contains("images"), where,
                   ": expected \"image\" and \"text\", \"segments\", \"messages\" or \"conversations\", the row has ",
                   keys_of(row.json));
    read_captioned(entry, json, row);
  }
  MOEGRAFT_CHECK(!entry.segments.empty(), where, ": the document is empty");
  return entry;
}

}  // namespace

std::vector<ManifestEntry> read_manifest(const std::filesystem::path& path, const BadRow& bad,
                                         const ManifestColumns& columns) {
  std::vector<ManifestEntry> entries;
  int64_t refused = 0;
  std::string first;
  std::set<std::string> passed_over;  // columns of pictures
  const BadRow note = [&](const std::string& why) {
    if (refused++ == 0) first = why;
    bad(why);
  };
  io::read_rows(
      path, [&](const io::Row& row) { entries.push_back(read_entry(row, columns, passed_over)); }, bad ? note : bad);
  for (const auto& key : passed_over)
    log::warning(path.string(), ": the pictures under \"", key,
                 "\" are not read, beside those of another key (--image-column chooses)");
  MOEGRAFT_CHECK(!entries.empty() || refused == 0, "manifest ", path.string(), ": none of its ", refused,
                 " rows can be read; the first: ", first);
  MOEGRAFT_CHECK(!entries.empty(), "manifest ", path.string(),
                 " has no document that can be read: one JSON object a line is expected, an ImageFolder, a tar "
                 "(WebDataset), or a Parquet or Arrow file (Hugging Face)");
  return entries;
}

}  // namespace moegraft::data
