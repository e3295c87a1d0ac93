#pragma once
// Pictures of a colour-bitmap font (CBDT). HarfBuzz maps a code point sequence to its ligature glyph, FreeType reads
// the bitmap.

#include <torch/types.h>

#include <filesystem>
#include <memory>
#include <string>

namespace moegraft::emoji {

class EmojiFont {
 public:
  explicit EmojiFont(const std::filesystem::path& path);  // UserError: missing, not a font, no colour bitmaps
  ~EmojiFont();
  EmojiFont(const EmojiFont&) = delete;
  EmojiFont& operator=(const EmojiFont&) = delete;

  // 0 when the font does not draw the whole sequence as one glyph.
  uint32_t glyph(const std::u32string& code_points) const;
  // uint8 [3,H,W] on white; undefined when the glyph has no colour bitmap.
  at::Tensor picture(uint32_t glyph) const;

 private:
  struct Handles;
  std::unique_ptr<Handles> handles_;
};

}  // namespace moegraft::emoji
