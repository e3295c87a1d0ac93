#pragma once
// RGB images: PNG and JPEG through libpng and libjpeg, the rest through libgd; alpha is composited on white.

#include <torch/types.h>

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "moegraft/io/picture.h"

namespace moegraft::io {

// Whether a name ends like that of a picture load_image() reads (.png, .JPG, .webp, …).
bool has_picture_extension(std::string_view name);

// uint8 [3,H,W]. UserError names the file when it does not decode.
at::Tensor load_image(const std::filesystem::path& path);
at::Tensor load_image(const Picture& picture);
at::Tensor decode_image(std::string_view bytes, const std::string& name);  // by magic number
void save_image(const std::filesystem::path& path,
                const at::Tensor& image_3HW);        // .png or .jpg by extension; uint8, or float in [0,1]
std::string png_bytes(const at::Tensor& image_3HW);  // the PNG file as a string: for many small files that need no
                                                     // fsync each, or for embedding

// Scales the shorter side to `size` (antialiased bicubic) and centre-crops to size × size. float32 [3,size,size] in
// [0,1].
at::Tensor resize_and_crop(const at::Tensor& image_3HW, int64_t size);
// Like CSS `contain`: the whole picture, scaled to fit and padded with white.
at::Tensor resize_and_pad(const at::Tensor& image_3HW, int64_t size);

// A grid of equal-sized images, `columns` wide, with a border; missing cells are white. uint8 [3,H,W].
at::Tensor contact_sheet(const std::vector<at::Tensor>& images_3HW, int64_t columns, int64_t border = 2);

}  // namespace moegraft::io
