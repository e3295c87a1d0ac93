#pragma once
// Pictures of manifests and their captions: what retrieval, likelihood ranking and baselines choose among.

#include <torch/types.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "moegraft/evaluate/config.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/io/picture.h"

namespace moegraft::evaluate {

// UserError when it is not loaded.
const codec::ImageCodec& codec_of(const graft::GraftedModel& model, const model::ModalityTokens& tokens);

// Pictures at the codec's size, or averaged down to most_side pixels a side where that is smaller; each once.
class Gallery {
 public:
  explicit Gallery(const codec::ImageCodec& codec, int64_t most_side = 0) : codec_(&codec), most_side_(most_side) {}

  int64_t add(const io::Picture& picture);  // its index; -1, and a warning the first time, when it does not decode
  int64_t size() const { return static_cast<int64_t>(files_.size()); }
  int64_t skipped() const { return skipped_; }
  const std::string& file(int64_t index) const { return files_[size_t(index)]; }
  const at::Tensor& picture(int64_t index) const { return pictures_3HW_[size_t(index)]; }  // float32 [3,H,W] in [0,1]
  at::Tensor stacked() const { return at::stack(pictures_3HW_); }                          // [M,3,H,W]

 private:
  const codec::ImageCodec* codec_;
  int64_t most_side_;
  std::vector<std::string> files_;
  std::vector<at::Tensor> pictures_3HW_;
  std::map<std::string, int64_t> index_;
  int64_t skipped_ = 0;
};

struct CaptionedPicture {
  std::vector<std::string> captions;  // the main one first; at least one
  int64_t picture = 0;                // in the gallery
};

// Captioned pictures of a manifest, in its order; all its pictures go to the gallery. Of more than max_entries (0: any
// number) those that seed draws. UserError when there is none that decodes.
std::vector<CaptionedPicture> read_pictures(const std::filesystem::path& manifest, Gallery& gallery,
                                            int64_t max_entries = 0, int64_t seed = 0);

// A retrieval's prompts (their first captions), chosen by its seed, and all pictures that they choose among.
struct RetrievalTask {
  Gallery gallery;
  std::vector<CaptionedPicture> prompts;
};
RetrievalTask read_task(const RetrievalSection& section, const codec::ImageCodec& codec, int64_t most_side = 0);

}  // namespace moegraft::evaluate
