// The libraries report errors by longjmp: every function that calls setjmp holds only plain data, and what needs a
// destructor lives in its caller.

#include "image_codec.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

// jpeglib.h needs stdio.h first.
#include <jpeglib.h>
#include <jerror.h>
#include <png.h>

#include "moegraft/base/check.h"

namespace moegraft::io {

namespace {

constexpr int64_t kMaxPixels = int64_t{1} << 27;  // 134 megapixels: a small file may claim far more than memory holds

uint8_t divide_by_255(unsigned value) { return static_cast<uint8_t>((value + 127) / 255); }

// ---- PNG ----

struct PngReader {
  png_structp png = nullptr;
  png_infop info = nullptr;
  const char* at = nullptr;
  size_t left = 0;
  char message[200] = "out of memory";
  ~PngReader() { png_destroy_read_struct(&png, &info, nullptr); }
};

void png_on_error(png_structp png, png_const_charp message) {
  auto* reader = static_cast<PngReader*>(png_get_error_ptr(png));
  std::snprintf(reader->message, sizeof reader->message, "%s", message);
  png_longjmp(png, 1);
}
void png_on_warning(png_structp, png_const_charp) {}

void png_on_read(png_structp png, png_bytep into, size_t bytes) {
  auto* reader = static_cast<PngReader*>(png_get_io_ptr(png));
  if (bytes > reader->left) png_error(png, "the file ends too early");
  std::memcpy(into, reader->at, bytes);
  reader->at += bytes;
  reader->left -= bytes;
}

// Sets up conversion of whatever the file holds to 8-bit RGBA.
bool png_read_header(PngReader& reader) {
  if (setjmp(png_jmpbuf(reader.png))) return false;
  png_set_read_fn(reader.png, &reader, png_on_read);
  png_read_info(reader.png, reader.info);
  png_set_expand(reader.png);  // palette to RGB, gray below 8 bits to 8, tRNS to alpha
  png_set_scale_16(reader.png);
  png_set_gray_to_rgb(reader.png);
  png_set_add_alpha(reader.png, 0xff, PNG_FILLER_AFTER);
  png_set_interlace_handling(reader.png);
  png_read_update_info(reader.png, reader.info);
  return true;
}

bool png_read_pixels(PngReader& reader, png_bytepp rows) {
  if (setjmp(png_jmpbuf(reader.png))) return false;
  png_read_image(reader.png, rows);
  png_read_end(reader.png, nullptr);
  return true;
}

// ---- JPEG ----

struct JpegErrors {
  jpeg_error_mgr manager;  // first: libjpeg hands back a pointer to it
  std::jmp_buf jump;
  char message[JMSG_LENGTH_MAX];
};

void jpeg_on_error(j_common_ptr info) {
  auto* errors = reinterpret_cast<JpegErrors*>(info->err);
  info->err->format_message(info, errors->message);
  std::longjmp(errors->jump, 1);
}
void jpeg_on_message(j_common_ptr info, int level) {
  // libjpeg paints what is missing grey and only warns; half a picture is damage here. Other warnings (stray bytes) are
  // harmless.
  const int code = info->err->msg_code;
  if (level < 0 && (code == JWRN_JPEG_EOF || code == JWRN_HIT_MARKER)) jpeg_on_error(info);
}

void set_up(JpegErrors& errors) {
  jpeg_std_error(&errors.manager);
  errors.manager.error_exit = jpeg_on_error;
  errors.manager.emit_message = jpeg_on_message;
  errors.message[0] = '\0';
}

struct JpegReader {
  jpeg_decompress_struct info{};
  JpegErrors errors{};
  ~JpegReader() { jpeg_destroy_decompress(&info); }
};

bool jpeg_read_start(JpegReader& reader, const unsigned char* bytes, size_t size) {
  set_up(reader.errors);
  reader.info.err = &reader.errors.manager;
  if (setjmp(reader.errors.jump)) return false;
  jpeg_create_decompress(&reader.info);
  jpeg_mem_src(&reader.info, bytes, size);
  jpeg_save_markers(&reader.info, JPEG_APP0 + 1, 0xffff);
  jpeg_read_header(&reader.info, TRUE);
  const bool four_inks = reader.info.jpeg_color_space == JCS_CMYK || reader.info.jpeg_color_space == JCS_YCCK;
  reader.info.out_color_space = four_inks ? JCS_CMYK : JCS_RGB;
  return true;
}

bool jpeg_read_pixels(JpegReader& reader, uint8_t* pixels, size_t row_bytes) {
  if (setjmp(reader.errors.jump)) return false;
  jpeg_start_decompress(&reader.info);
  while (reader.info.output_scanline < reader.info.output_height) {
    JSAMPROW row = pixels + reader.info.output_scanline * row_bytes;
    jpeg_read_scanlines(&reader.info, &row, 1);
  }
  jpeg_finish_decompress(&reader.info);
  return true;
}

// An EXIF block of a JPEG file lies behind "Exif\0\0".
int exif_orientation(const uint8_t* data, size_t size) {
  return size < 6 || std::memcmp(data, "Exif\0\0", 6) != 0 ? 1 : tiff_orientation(data + 6, size - 6);
}

// PNG's chunk eXIf is an EXIF block alone.
int png_orientation(std::string_view bytes) {
  const auto* data = reinterpret_cast<const uint8_t*>(bytes.data());
  for (size_t at = 8; at + 12 <= bytes.size();) {
    const uint64_t length =
        uint64_t(data[at]) << 24 | uint64_t(data[at + 1]) << 16 | uint64_t(data[at + 2]) << 8 | data[at + 3];
    if (length > bytes.size() - at - 12) return 1;
    if (bytes.substr(at + 4, 4) == "eXIf") return tiff_orientation(data + at + 8, length);
    at += 12 + length;
  }
  return 1;
}

struct JpegWriter {
  jpeg_compress_struct info{};
  JpegErrors errors{};
  unsigned char* bytes = nullptr;
  unsigned long size = 0;
  ~JpegWriter() {
    jpeg_destroy_compress(&info);
    std::free(bytes);
  }
};

bool jpeg_write(JpegWriter& writer, const Pixels& pixels, int quality) {
  set_up(writer.errors);
  writer.info.err = &writer.errors.manager;
  if (setjmp(writer.errors.jump)) return false;
  jpeg_create_compress(&writer.info);
  jpeg_mem_dest(&writer.info, &writer.bytes, &writer.size);
  writer.info.image_width = static_cast<JDIMENSION>(pixels.width);
  writer.info.image_height = static_cast<JDIMENSION>(pixels.height);
  writer.info.input_components = 3;
  writer.info.in_color_space = JCS_RGB;
  jpeg_set_defaults(&writer.info);
  jpeg_set_quality(&writer.info, quality, TRUE);
  jpeg_start_compress(&writer.info, TRUE);
  while (writer.info.next_scanline < writer.info.image_height) {
    auto* row =
        const_cast<JSAMPROW>(pixels.rgb.data() + writer.info.next_scanline * static_cast<size_t>(pixels.width) * 3);
    jpeg_write_scanlines(&writer.info, &row, 1);
  }
  jpeg_finish_compress(&writer.info);
  return true;
}

}  // namespace

void check_picture_size(int64_t width, int64_t height, const std::string& name) {
  MOEGRAFT_CHECK(width > 0 && height > 0 && width <= kMaxPixels / height, name, ": picture of ", width, " x ", height,
                 " pixels, at most ", kMaxPixels, " pixels are read");
}

int tiff_orientation(const uint8_t* tiff, size_t size) {
  if (size < 10 || (std::memcmp(tiff, "II*\0", 4) != 0 && std::memcmp(tiff, "MM\0*", 4) != 0)) return 1;
  const bool little = tiff[0] == 'I';
  const auto u16 = [&](uint64_t at) {
    return uint64_t(little ? tiff[at] | tiff[at + 1] << 8 : tiff[at] << 8 | tiff[at + 1]);
  };
  const auto u32 = [&](uint64_t at) { return little ? u16(at) | u16(at + 2) << 16 : u16(at) << 16 | u16(at + 2); };
  const uint64_t directory = u32(4);
  if (directory + 2 > size) return 1;
  const uint64_t count = u16(directory);
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t entry = directory + 2 + 12 * i;
    if (entry + 12 > size) return 1;
    if (u16(entry) != 0x0112) continue;
    const uint64_t value = u16(entry + 8);
    return value >= 1 && value <= 8 ? int(value) : 1;
  }
  return 1;
}

Pixels decode_png(std::string_view bytes, const std::string& name) {
  PngReader reader;
  reader.at = bytes.data();
  reader.left = bytes.size();
  reader.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &reader, png_on_error, png_on_warning);
  if (reader.png != nullptr) reader.info = png_create_info_struct(reader.png);
  MOEGRAFT_CHECK(reader.info != nullptr && png_read_header(reader), name, ": cannot decode PNG: ", reader.message);

  Pixels pixels;
  pixels.width = png_get_image_width(reader.png, reader.info);
  pixels.height = png_get_image_height(reader.png, reader.info);
  check_picture_size(pixels.width, pixels.height, name);
  const size_t row_bytes = static_cast<size_t>(pixels.width) * 4;
  MOEGRAFT_INVARIANT(png_get_rowbytes(reader.png, reader.info) == row_bytes, "RGBA rows expected");
  std::vector<uint8_t> rgba(row_bytes * static_cast<size_t>(pixels.height));
  std::vector<png_bytep> rows(static_cast<size_t>(pixels.height));
  for (size_t y = 0; y < rows.size(); ++y) rows[y] = rgba.data() + y * row_bytes;
  MOEGRAFT_CHECK(png_read_pixels(reader, rows.data()), name, ": cannot decode PNG: ", reader.message);

  pixels.rgb.resize(rgba.size() / 4 * 3);
  for (size_t i = 0; i < rgba.size() / 4; ++i) {
    const unsigned alpha = rgba[4 * i + 3];
    for (size_t c = 0; c < 3; ++c) pixels.rgb[3 * i + c] = divide_by_255(rgba[4 * i + c] * alpha + 255 * (255 - alpha));
  }
  pixels.orientation = png_orientation(bytes);
  return pixels;
}

Pixels decode_jpeg(std::string_view bytes, const std::string& name) {
  JpegReader reader;
  const auto* data = reinterpret_cast<const unsigned char*>(bytes.data());
  MOEGRAFT_CHECK(jpeg_read_start(reader, data, bytes.size()), name, ": cannot decode JPEG: ", reader.errors.message);
  Pixels pixels;
  pixels.width = reader.info.image_width;
  pixels.height = reader.info.image_height;
  check_picture_size(pixels.width, pixels.height, name);
  for (auto* marker = reader.info.marker_list; marker != nullptr; marker = marker->next) {
    pixels.orientation = exif_orientation(marker->data, marker->data_length);
    if (pixels.orientation != 1) break;
  }

  const bool four_inks = reader.info.out_color_space == JCS_CMYK;
  const size_t count = static_cast<size_t>(pixels.width) * static_cast<size_t>(pixels.height);
  const size_t channels = four_inks ? 4 : 3;
  std::vector<uint8_t> samples(count * channels);
  MOEGRAFT_CHECK(jpeg_read_pixels(reader, samples.data(), static_cast<size_t>(pixels.width) * channels), name,
                 ": cannot decode JPEG: ", reader.errors.message);
  if (!four_inks) {
    pixels.rgb = std::move(samples);
    return pixels;
  }
  // Without a colour profile: paper showing through two inks. Adobe's files hold the paper (255 - ink) instead of the
  // ink.
  const uint8_t flip = reader.info.saw_Adobe_marker ? 0 : 255;
  pixels.rgb.resize(count * 3);
  for (size_t i = 0; i < count; ++i)
    for (size_t c = 0; c < 3; ++c)
      pixels.rgb[3 * i + c] = divide_by_255(static_cast<unsigned>(samples[4 * i + c] ^ flip) *
                                            static_cast<unsigned>(samples[4 * i + 3] ^ flip));
  return pixels;
}

std::string encode_png(const Pixels& pixels) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(pixels.width);
  image.height = static_cast<png_uint_32>(pixels.height);
  image.format = PNG_FORMAT_RGB;
  png_alloc_size_t size = PNG_IMAGE_PNG_SIZE_MAX(image);
  std::string bytes(size, '\0');
  const int done = png_image_write_to_memory(&image, bytes.data(), &size, 0, pixels.rgb.data(), 0, nullptr);
  MOEGRAFT_CHECK(done != 0, "cannot encode PNG: ", image.message);
  bytes.resize(size);
  return bytes;
}

std::string encode_jpeg(const Pixels& pixels, int quality) {
  JpegWriter writer;
  MOEGRAFT_CHECK(jpeg_write(writer, pixels, quality), "cannot encode JPEG: ", writer.errors.message);
  return {reinterpret_cast<const char*>(writer.bytes), writer.size};
}

}  // namespace moegraft::io
