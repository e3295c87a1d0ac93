#include "moegraft/codec/pictures.h"

#include "libtorch.h"

#include <algorithm>
#include <cstring>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"

namespace moegraft::codec {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> manifest_images(const fs::path& manifest) {
  const std::string text = io::read_file(manifest);
  std::vector<fs::path> images;
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line(text.data() + begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto json = io::Json::parse(line, nullptr, /*allow_exceptions=*/false);
    MOEGRAFT_CHECK(json.is_object(), manifest.string(), ":", number, ": expected a JSON object such as {\"image\": \"a.png\", \"text\": \"…\"}");
    const char* key = json.contains("image") ? "image" : json.contains("file_name") ? "file_name" : nullptr;
    if (!key) continue;
    MOEGRAFT_CHECK(json[key].is_string(), manifest.string(), ":", number, ": \"", key, "\" must be a path");
    images.push_back(manifest.parent_path() / json[key].get<std::string>());  // an absolute path replaces the folder
  }
  return images;
}

bool is_picture(const fs::path& path) { return io::has_picture_extension(path.extension().string()); }

std::vector<fs::path> folder_images(const fs::path& folder) {
  std::vector<fs::path> images;
  for (const auto& entry : fs::directory_iterator(folder))
    if (is_picture(entry.path())) images.push_back(entry.path());
  std::sort(images.begin(), images.end());
  return images;
}

}  // namespace

Pictures load_pictures(const fs::path& source, int64_t size, const std::string& fit, int64_t max_bytes) {
  MOEGRAFT_CHECK(fs::exists(source), "pictures ", source.string(), " do not exist; expected a JSONL manifest or a folder of pictures");
  const auto files = fs::is_directory(source) ? folder_images(source) : is_picture(source) ? std::vector<fs::path>{source} : manifest_images(source);
  MOEGRAFT_CHECK(!files.empty(), source.string(), " names no picture");
  const int64_t bytes = 3 * size * size;
  MOEGRAFT_CHECK(int64_t(files.size()) <= max_bytes / bytes, source.string(), ": ", files.size(), " pictures of ", size, "x", size, " exceed the memory limit of ",
                 max_bytes >> 20, " MiB; use fewer, or a smaller codec.image_size");
  Pictures out;
  out.pixels_N3HW = at::empty({int64_t(files.size()), 3, size, size}, at::kByte);
  for (const auto& file : files) {
    try {
      const auto image = io::load_image(file);
      const bool exact = image.size(1) == size && image.size(2) == size;
      const auto fitted = exact ? image : (fit == "pad" ? io::resize_and_pad(image, size) : io::resize_and_crop(image, size)).mul(255).round_().clamp_(0, 255).to(at::kByte);
      out.pixels_N3HW[int64_t(out.paths.size())].copy_(fitted);
      out.paths.push_back(file.string());
    } catch (const UserError& e) {
      log::warning("skipped ", file.string(), ": ", e.what());
      ++out.skipped;
    }
  }
  if (out.skipped) log::warning(source.string(), ": ", out.skipped, " of ", files.size(), " pictures skipped");
  MOEGRAFT_CHECK(!out.paths.empty(), source.string(), ": none of its ", files.size(), " pictures decodes");
  out.pixels_N3HW = out.pixels_N3HW.narrow(0, 0, int64_t(out.paths.size()));
  return out;
}

at::Tensor to_float(const at::Tensor& pixels_B3HW) {
  return pixels_B3HW.to(at::kFloat).div_(255).contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace moegraft::codec
