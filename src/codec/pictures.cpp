#include "moegraft/codec/pictures.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/io/image.h"
#include "moegraft/io/rows.h"

namespace moegraft::codec {
namespace {

namespace fs = std::filesystem;

// What a data set names as pictures; the rest of its rows is passed over.
std::vector<io::Picture> named_pictures(const fs::path& source, Pictures& out) {
  std::vector<io::Picture> pictures;
  const auto skip = [&](const std::string& why) {
    log::warning("skipped ", why);
    ++out.skipped;
  };
  io::read_rows(
      source,
      [&](const io::Row& row) {
        const auto& json = row.json;
        MOEGRAFT_CHECK(json.is_object(), row.where,
                       ": expected a JSON object such as {\"image\": \"a.png\", \"text\": \"…\"}");
        if (const char* key = json.contains("image") ? "image" : json.contains("file_name") ? "file_name" : nullptr) {
          MOEGRAFT_CHECK(json[key].is_string(), row.where, ": \"", key, "\" must be a path");
          pictures.push_back(row.picture(json[key].get<std::string>()));
        }
        if (!json.contains("images") || !json["images"].is_array()) return;
        for (const auto& name : json["images"]) {
          MOEGRAFT_CHECK(name.is_string(), row.where, ": \"images\" must be a list of paths");
          pictures.push_back(row.picture(name.get<std::string>()));
        }
      },
      skip);
  return pictures;
}

bool is_picture(const fs::path& path) { return io::has_picture_extension(path.extension().string()); }

std::vector<io::Picture> folder_pictures(const fs::path& folder) {
  std::vector<io::Picture> pictures;
  for (const auto& entry : fs::directory_iterator(folder))
    if (is_picture(entry.path())) pictures.emplace_back(entry.path());
  std::sort(pictures.begin(), pictures.end());
  return pictures;
}

std::vector<io::Picture> list_pictures(const fs::path& source, Pictures& out) {
  if (!fs::is_directory(source))
    return is_picture(source) ? std::vector<io::Picture>{source} : named_pictures(source, out);
  auto pictures = folder_pictures(source);
  if (pictures.empty()) return named_pictures(source, out);
  int64_t folders = 0;
  for (const auto& item : fs::directory_iterator(source)) {
    MOEGRAFT_CHECK(!io::is_row_format(item.path()), source.string(), " holds pictures and the data set ",
                   item.path().filename().string(), ": name the one that is meant");
    if (item.is_directory() && !item.path().filename().string().starts_with("."))
      folders += !folder_pictures(item.path()).empty();
  }
  if (folders > 0)
    log::warning(source.string(), ": the pictures in ", folders,
                 " folders within it are passed over; name them for themselves");
  return pictures;
}

}  // namespace

Pictures load_pictures(const fs::path& source, int64_t size, const std::string& fit, int64_t max_bytes) {
  MOEGRAFT_CHECK(fs::exists(source) || io::is_file_pattern(source), "pictures ", source.string(),
                 " do not exist; expected a manifest, a folder of pictures, or a data set (tar, Parquet, Arrow)");
  Pictures out;
  const auto pictures = list_pictures(source, out);
  const int64_t total = int64_t(pictures.size()) + out.skipped;
  MOEGRAFT_CHECK(total > 0, source.string(), " names no picture");
  const int64_t bytes = 3 * size * size;
  MOEGRAFT_CHECK(int64_t(pictures.size()) <= max_bytes / bytes, source.string(), ": ", pictures.size(), " pictures of ",
                 size, "x", size, " exceed the memory limit of ", max_bytes >> 20,
                 " MiB; use fewer, or a smaller codec.image_size");
  out.pixels_N3HW = at::empty({int64_t(pictures.size()), 3, size, size}, at::kByte);
  for (const auto& picture : pictures) {
    try {
      const auto image = io::load_image(picture);
      const bool exact = image.size(1) == size && image.size(2) == size;
      const auto fitted = exact ? image
                                : (fit == "pad" ? io::resize_and_pad(image, size) : io::resize_and_crop(image, size))
                                      .mul(255)
                                      .round_()
                                      .clamp_(0, 255)
                                      .to(at::kByte);
      out.pixels_N3HW[int64_t(out.paths.size())].copy_(fitted);
      out.paths.push_back(picture.name());
    } catch (const io::SourceChanged&) { throw; } catch (const UserError& e) {
      log::warning("skipped ", picture.name(), ": ", e.what());
      ++out.skipped;
    }
  }
  if (out.skipped) log::warning(source.string(), ": ", out.skipped, " of ", total, " pictures skipped");
  MOEGRAFT_CHECK(!out.paths.empty(), source.string(), ": none of its ", total, " pictures decodes");
  out.pixels_N3HW = out.pixels_N3HW.narrow(0, 0, int64_t(out.paths.size()));
  return out;
}

at::Tensor to_float(const at::Tensor& pixels_B3HW) {
  return pixels_B3HW.to(at::kFloat).div_(255).contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace moegraft::codec
