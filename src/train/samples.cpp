#include "samples.h"

#include "libtorch.h"

#include "moegraft/base/log.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/generate/images.h"
#include "moegraft/io/image.h"

namespace moegraft::train {
namespace {

// What prompts draw: "image", or the first modality of images. Empty: there is none.
std::string modality_to_draw(const graft::GraftedModel& model) {
  std::string first;
  for (const auto& tokens : model.vocabulary.modalities) {
    const auto codec = model.codecs.find(tokens.name);
    if (codec == model.codecs.end() || !dynamic_cast<const codec::ImageCodec*>(codec->second.get())) continue;
    if (first.empty() || tokens.name == "image") first = tokens.name;
  }
  return first;
}

}  // namespace

std::filesystem::path write_samples(graft::GraftedModel& model, const std::vector<std::string>& prompts,
                                    const std::filesystem::path& dir, int64_t step, uint64_t seed) {
  generate::ImageOptions options;
  options.modality = modality_to_draw(model);
  if (prompts.empty() || options.modality.empty()) return {};
  at::NoGradGuard no_grad;
  options.seed = seed;
  options.sampling.temperature = 0;  // the likeliest picture: comparable between steps
  std::vector<at::Tensor> pictures;
  for (const auto& result : generate::generate_images(model, prompts, options)) pictures.push_back(result.pixels_3HW);
  if (dir.empty()) return {};
  const auto file = dir / (checkpoint::step_name(step) + ".png");
  io::save_image(file, io::contact_sheet(pictures, std::min<int64_t>(8, int64_t(pictures.size()))));
  log::info("step ", step, ": samples in ", file.string());
  return file;
}

}  // namespace moegraft::train
