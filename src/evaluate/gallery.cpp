#include "gallery.h"

#include <algorithm>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/rng.h"
#include "moegraft/data/manifest.h"
#include "moegraft/io/image.h"

namespace moegraft::evaluate {

namespace fs = std::filesystem;

const codec::ImageCodec& codec_of(const graft::GraftedModel& model, const model::ModalityTokens& tokens) {
  const codec::ImageCodec* codec = graft::find_image_codec(model, tokens.name);
  MOEGRAFT_CHECK(codec, "the codec of ", tokens.name, " is not loaded");
  return *codec;
}

int64_t Gallery::add(const io::Picture& picture) {
  const auto [at, fresh] = index_.emplace(fs::path(picture.name()).lexically_normal().string(), -1);
  if (!fresh) return at->second;
  try {
    at::Tensor picture_3HW = codec_->prepare(io::load_image(picture)).contiguous();
    if (most_side_ > 0 && most_side_ < picture_3HW.size(-1))
      picture_3HW = at::adaptive_avg_pool2d(picture_3HW, {most_side_, most_side_});
    pictures_3HW_.push_back(std::move(picture_3HW));
  } catch (const io::SourceChanged&) { throw; } catch (const UserError& e) {
    log::warning("skipped ", picture.name(), ": ", e.what());
    ++skipped_;
    return -1;
  }
  files_.push_back(at->first);
  return at->second = size() - 1;
}

std::vector<CaptionedPicture> read_pictures(const fs::path& manifest, Gallery& gallery, int64_t max_entries,
                                            int64_t seed) {
  std::vector<CaptionedPicture> pictures;
  const auto entries = data::read_manifest(manifest);
  auto chosen = Rng(uint64_t(seed), "evaluate.pictures").permutation(int64_t(entries.size()));
  if (max_entries > 0 && int64_t(chosen.size()) > max_entries) chosen.resize(size_t(max_entries));
  std::sort(chosen.begin(), chosen.end());
  for (const int64_t index : chosen) {
    const auto& entry = entries[size_t(index)];
    int64_t picture = -1;
    for (const auto& segment : entry.segments)
      if (segment.is_image()) picture = gallery.add(segment.image);
    if (picture >= 0 && !entry.captions.empty()) pictures.push_back({entry.captions, picture});
  }
  MOEGRAFT_CHECK(!pictures.empty(), manifest.string(), " holds no picture with a caption that decodes");
  return pictures;
}

RetrievalTask read_task(const RetrievalSection& section, const codec::ImageCodec& codec, int64_t most_side) {
  RetrievalTask task{Gallery(codec, most_side), {}};
  const auto all = read_pictures(section.manifest, task.gallery);
  if (!section.candidates.empty()) read_pictures(section.candidates, task.gallery);
  for (const int64_t i : Rng(uint64_t(section.seed), "evaluate.retrieval").permutation(int64_t(all.size())))
    if (int64_t(task.prompts.size()) < section.n) task.prompts.push_back(all[size_t(i)]);
  return task;
}

}  // namespace moegraft::evaluate
