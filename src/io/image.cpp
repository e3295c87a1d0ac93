#include "moegraft/io/image.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "image_codec.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/io/files.h"

namespace moegraft::io {

namespace {

constexpr int kJpegQuality = 95;
constexpr int64_t kMaxAspect = 16;

void check_image(const at::Tensor& image, const char* what) {
  MOEGRAFT_CHECK(image.defined() && image.dim() == 3 && image.size(0) == 3 && image.numel() > 0, what,
                 ": expected a picture of shape [3, H, W], got ",
                 image.defined() ? image.sizes().vec() : std::vector<int64_t>{});
  MOEGRAFT_CHECK(image.scalar_type() == at::kByte || image.is_floating_point(), what,
                 ": expected a uint8 or floating picture, got ", c10::toString(image.scalar_type()));
}

at::Tensor to_float(const at::Tensor& image) {
  if (image.scalar_type() == at::kByte) return image.to(at::kCPU, at::kFloat).div_(255.0);
  return image.detach().to(at::kCPU, at::kFloat);
}
at::Tensor to_bytes(const at::Tensor& image) {
  if (image.scalar_type() == at::kByte) return image.to(at::kCPU);
  return image.detach().to(at::kCPU, at::kFloat).nan_to_num(0.0).clamp(0.0, 1.0).mul_(255.0).round_().to(at::kByte);
}

// How EXIF says the stored picture must be turned; see the standard's table for tag 0x0112.
at::Tensor orient(at::Tensor image_3HW, int orientation) {
  if (orientation >= 5) image_3HW = image_3HW.transpose(1, 2);
  const bool flip_y = orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8;
  const bool flip_x = orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7;
  if (flip_y) image_3HW = image_3HW.flip({1});
  if (flip_x) image_3HW = image_3HW.flip({2});
  return image_3HW.contiguous();
}

at::Tensor resize(const at::Tensor& image_3HW, int64_t height, int64_t width) {
  if (image_3HW.size(1) == height && image_3HW.size(2) == width) return image_3HW.clone();
  // Bicubic weights are partly negative: the result may overshoot the input's range.
  return at::_upsample_bicubic2d_aa(image_3HW.unsqueeze(0).contiguous(), {height, width}, /*align_corners=*/false)
      .squeeze(0)
      .clamp_(0.0, 1.0);
}

int64_t scaled(int64_t side, int64_t numerator, int64_t denominator) {
  return std::max<int64_t>(
      1, std::llround(static_cast<double>(side) * static_cast<double>(numerator) / static_cast<double>(denominator)));
}

bool starts_with(std::string_view bytes, std::string_view magic) { return bytes.substr(0, magic.size()) == magic; }

Pixels to_pixels(const at::Tensor& image_3HW, const char* what) {
  check_image(image_3HW, what);
  const at::Tensor interleaved = to_bytes(image_3HW).permute({1, 2, 0}).contiguous();
  const uint8_t* data = interleaved.const_data_ptr<uint8_t>();
  return {interleaved.size(1), interleaved.size(0), std::vector<uint8_t>(data, data + interleaved.numel()), 1};
}

}  // namespace

at::Tensor decode_image(std::string_view bytes, const std::string& name) {
  Pixels pixels;
  if (starts_with(bytes, "\x89PNG\r\n\x1a\n")) {
    pixels = decode_png(bytes, name);
  } else if (starts_with(bytes, "\xff\xd8\xff")) {
    pixels = decode_jpeg(bytes, name);
  } else if (is_tiff(bytes)) {
    pixels = decode_tiff(bytes, name);
  } else if (auto other = decode_other(bytes, name)) {
    pixels = std::move(*other);
  } else {
    fail(name, bytes.empty() ? ": the file is empty, expected a picture"
                             : ": not a PNG, JPEG, WebP, GIF, BMP or TIFF picture");
  }
  const auto interleaved = at::from_blob(pixels.rgb.data(), {pixels.height, pixels.width, 3}, at::kByte);
  // clone, not contiguous(): a picture of one pixel is contiguous already and would keep pointing into `pixels`.
  return orient(interleaved.permute({2, 0, 1}).clone(at::MemoryFormat::Contiguous), pixels.orientation);
}

bool has_picture_extension(std::string_view name) {
  const std::string lower = lower_case(name);
  for (const char* extension :
       {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl"})
    if (lower.ends_with(extension)) return true;
  return false;
}

at::Tensor load_image(const std::filesystem::path& path) { return decode_image(read_file(path), path.string()); }
at::Tensor load_image(const Picture& picture) { return decode_image(picture.read(), picture.name()); }

void save_image(const std::filesystem::path& path, const at::Tensor& image_3HW) {
  const std::string extension = lower_case(path.extension().string());
  const bool png = extension == ".png", jpeg = extension == ".jpg" || extension == ".jpeg";
  MOEGRAFT_CHECK(png || jpeg, "cannot write ", path.string(), ": expected a name ending in .png or .jpg");
  const Pixels pixels = to_pixels(image_3HW, "save_image");
  write_file_atomic(path, png ? encode_png(pixels) : encode_jpeg(pixels, kJpegQuality));
}

std::string png_bytes(const at::Tensor& image_3HW) { return encode_png(to_pixels(image_3HW, "png_bytes")); }

at::Tensor resize_and_crop(const at::Tensor& image_3HW, int64_t size) {
  check_image(image_3HW, "resize_and_crop");
  MOEGRAFT_CHECK(size > 0, "resize_and_crop: size must be positive, got ", size);
  const int64_t shorter = std::min(image_3HW.size(1), image_3HW.size(2));
  at::Tensor image = image_3HW;
  // The ends of a very long strip are cropped anyway: scaling a 1 x 100000 picture whole would need gigabytes.
  for (const int64_t dim : {1, 2}) {
    const int64_t kept = std::min(image.size(dim), kMaxAspect * shorter);
    image = image.narrow(dim, (image.size(dim) - kept) / 2, kept);
  }
  const int64_t height = scaled(image.size(1), size, shorter), width = scaled(image.size(2), size, shorter);
  return resize(to_float(image), height, width)
      .narrow(1, (height - size) / 2, size)
      .narrow(2, (width - size) / 2, size)
      .contiguous();
}

at::Tensor resize_and_pad(const at::Tensor& image_3HW, int64_t size) {
  check_image(image_3HW, "resize_and_pad");
  MOEGRAFT_CHECK(size > 0, "resize_and_pad: size must be positive, got ", size);
  const int64_t longer = std::max(image_3HW.size(1), image_3HW.size(2));
  const int64_t height = scaled(image_3HW.size(1), size, longer), width = scaled(image_3HW.size(2), size, longer);
  at::Tensor padded = at::ones({3, size, size}, at::kFloat);
  padded.narrow(1, (size - height) / 2, height)
      .narrow(2, (size - width) / 2, width)
      .copy_(resize(to_float(image_3HW), height, width));
  return padded;
}

at::Tensor contact_sheet(const std::vector<at::Tensor>& images_3HW, int64_t columns, int64_t border) {
  MOEGRAFT_CHECK(!images_3HW.empty() && columns > 0 && border >= 0,
                 "contact_sheet: expected at least one picture and one column, got ", images_3HW.size(), " pictures, ",
                 columns, " columns, border ", border);
  for (const auto& image : images_3HW) check_image(image, "contact_sheet");
  const int64_t height = images_3HW[0].size(1), width = images_3HW[0].size(2),
                count = static_cast<int64_t>(images_3HW.size());
  const int64_t rows = (count + columns - 1) / columns;
  at::Tensor sheet =
      at::full({3, border + rows * (height + border), border + columns * (width + border)}, 255, at::kByte);
  for (int64_t i = 0; i < count; ++i) {
    const at::Tensor& image = images_3HW[static_cast<size_t>(i)];
    MOEGRAFT_CHECK(image.size(1) == height && image.size(2) == width, "contact_sheet: picture ", i, " is ",
                   image.size(1), " x ", image.size(2), ", the first one ", height, " x ", width);
    sheet.narrow(1, border + i / columns * (height + border), height)
        .narrow(2, border + i % columns * (width + border), width)
        .copy_(to_bytes(image));
  }
  return sheet;
}

}  // namespace moegraft::io
