#include "emoji/font.h"

#include <ft2build.h>
#include FT_FREETYPE_H
#include <hb.h>

#include "moegraft/base/check.h"

namespace moegraft::emoji {

struct EmojiFont::Handles {
  FT_Library library = nullptr;
  FT_Face face = nullptr;
  hb_blob_t* blob = nullptr;
  hb_face_t* shaper_face = nullptr;
  hb_font_t* shaper_font = nullptr;
  hb_buffer_t* buffer = nullptr;
  ~Handles() {
    hb_buffer_destroy(buffer);
    hb_font_destroy(shaper_font);
    hb_face_destroy(shaper_face);
    hb_blob_destroy(blob);
    if (face) FT_Done_Face(face);
    if (library) FT_Done_FreeType(library);
  }
};

EmojiFont::EmojiFont(const std::filesystem::path& path) : handles_(std::make_unique<Handles>()) {
  auto& h = *handles_;
  MOEGRAFT_CHECK(std::filesystem::is_regular_file(path), "emoji font not found: ", path.string(),
                 " (Debian: apt install fonts-noto-color-emoji, or name another with --font)");
  MOEGRAFT_CHECK(FT_Init_FreeType(&h.library) == 0, "FreeType does not start");
  MOEGRAFT_CHECK(FT_New_Face(h.library, path.c_str(), 0, &h.face) == 0, path.string(),
                 " is not a font that FreeType reads");
  MOEGRAFT_CHECK(FT_HAS_COLOR(h.face) && h.face->num_fixed_sizes > 0, path.string(),
                 " has no colour bitmaps (CBDT); vector colour fonts are not supported");
  MOEGRAFT_CHECK(FT_Select_Size(h.face, 0) == 0, path.string(), ": FreeType cannot select its bitmap size");
  h.blob = hb_blob_create_from_file_or_fail(path.c_str());
  MOEGRAFT_CHECK(h.blob != nullptr, "cannot read ", path.string());
  h.shaper_face = hb_face_create(h.blob, 0);
  h.shaper_font = hb_font_create(h.shaper_face);
  h.buffer = hb_buffer_create();
}

EmojiFont::~EmojiFont() = default;

uint32_t EmojiFont::glyph(const std::u32string& code_points) const {
  auto* buffer = handles_->buffer;
  hb_buffer_clear_contents(buffer);
  hb_buffer_add_utf32(buffer, reinterpret_cast<const uint32_t*>(code_points.data()),
                      static_cast<int>(code_points.size()), 0, -1);
  hb_buffer_set_direction(buffer, HB_DIRECTION_LTR);
  hb_buffer_set_script(buffer, HB_SCRIPT_COMMON);
  hb_buffer_set_language(buffer, hb_language_from_string("en", -1));
  // Variation selectors without a glyph of their own must not count as a second glyph.
  hb_buffer_set_flags(buffer, HB_BUFFER_FLAG_REMOVE_DEFAULT_IGNORABLES);
  hb_shape(handles_->shaper_font, buffer, nullptr, 0);
  unsigned count = 0;
  const auto* glyphs = hb_buffer_get_glyph_infos(buffer, &count);
  return count == 1 ? glyphs[0].codepoint : 0;
}

at::Tensor EmojiFont::picture(uint32_t glyph) const {
  if (FT_Load_Glyph(handles_->face, glyph, FT_LOAD_COLOR | FT_LOAD_RENDER) != 0) return {};
  const FT_Bitmap& bitmap = handles_->face->glyph->bitmap;
  if (bitmap.pixel_mode != FT_PIXEL_MODE_BGRA || bitmap.width == 0 || bitmap.rows == 0) return {};
  const int64_t height = bitmap.rows, width = bitmap.width;
  auto image = at::empty({3, height, width}, at::kByte);
  auto* out = image.data_ptr<uint8_t>();
  for (int64_t y = 0; y < height; ++y) {
    const uint8_t* row = bitmap.buffer + y * static_cast<int64_t>(bitmap.pitch);
    for (int64_t x = 0; x < width; ++x) {
      // FreeType's BGRA is premultiplied: on white, out = c + (255 - a).
      const int rest = 255 - row[4 * x + 3];
      for (int c = 0; c < 3; ++c)
        out[(c * height + y) * width + x] = static_cast<uint8_t>(std::min(255, row[4 * x + 2 - c] + rest));
    }
  }
  return image;
}

}  // namespace moegraft::emoji
