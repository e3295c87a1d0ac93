// moegraft codec train | encode | decode | eval

#include "libtorch.h"

#include <iostream>
#include <memory>

#include "command.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/codec/pictures.h"
#include "moegraft/codec/train.h"
#include "moegraft/config/config.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/io/staged_folder.h"
#include "moegraft/train/codec.h"
#include "moegraft/run/signals.h"

namespace moegraft::tools {
namespace {

using codec::ImageCodec;

constexpr int64_t kSheetPairs = 48, kSheetColumns = 12;

io::Json to_json(const codec::Quality& q) {
  return {{"pictures", q.pictures},       {"psnr", q.psnr},
          {"psnr_pooled", q.psnr_pooled}, {"l1", q.l1},
          {"used_codes", q.used_codes},   {"code_perplexity", q.perplexity}};
}

std::string to_line(const codec::Quality& q) {
  return detail::concat(q.pictures, " pictures, PSNR ", q.psnr, " dB (pooled ", q.psnr_pooled, "), mean |error| ", q.l1,
                        ", ", q.used_codes, " codes used, perplexity ", q.perplexity);
}

// original | reconstruction pairs, spread evenly over the pictures
void write_sheet(const ImageCodec& codec, const at::Tensor& pixels_u8, const std::string& path) {
  const int64_t count = pixels_u8.size(0), pairs = std::min(kSheetPairs, count);
  std::vector<int64_t> picks;
  for (int64_t i = 0; i < pairs; ++i) picks.push_back(i * count / pairs);
  const auto originals = codec::to_float(pixels_u8.index_select(0, at::tensor(picks, at::kLong)));
  const auto rebuilt = codec.decode(codec.encode(originals)).cpu();
  std::vector<at::Tensor> cells;
  for (int64_t i = 0; i < pairs; ++i) cells.insert(cells.end(), {originals[i].contiguous(), rebuilt[i]});
  io::save_image(path, io::contact_sheet(cells, kSheetColumns));
}

struct Options {
  std::string config, codec_dir, output, ids, images, sheet, resume = "none";
  std::vector<std::string> overrides, pictures;
  int64_t columns = 0, threads = 0;
  bool json = false, overwrite = false;
};

// Before an hour's training, and at its end: what may be replaced.
void check_target(const std::filesystem::path& dir, bool overwrite) {
  MOEGRAFT_CHECK_USAGE(!dir.empty(), "dir is required: the folder that the codec is written to");
  if (!std::filesystem::exists(dir) || (std::filesystem::is_directory(dir) && std::filesystem::is_empty(dir))) return;
  MOEGRAFT_CHECK_USAGE(std::filesystem::exists(dir / "config.json") && std::filesystem::exists(dir / "codec.yaml"),
                       dir.string(), " exists and is no codec trained here; name another dir");
  MOEGRAFT_CHECK_USAGE(overwrite, dir.string(),
                       " holds a codec, and runs and shards made with it need it as it is: name another dir, or "
                       "replace it with --overwrite");
  const std::string foreign = io::find_foreign(
      dir, {"config.json", "model.safetensors", "codec.yaml", "metrics.jsonl", "report.json", "sheet.png"});
  MOEGRAFT_CHECK_USAGE(foreign.empty(), dir.string(), " holds ", foreign,
                       ", which no training wrote and --overwrite would remove: move it away or name another dir");
}

// Whether dir holds what this training would make of these pictures, as its codec.yaml and report.json say.
bool is_made(const codec::CodecRunConfig& config, const std::string& pictures) {
  const std::filesystem::path dir = config.dir;
  for (const char* name : {"config.json", "codec.yaml", "report.json"})
    if (!std::filesystem::exists(dir / name)) return false;
  const io::Json report = io::read_json(dir / "report.json");
  return report.contains("fingerprint") && report["fingerprint"] == pictures &&
         train::codec_changes(
             config::parse<codec::CodecRunConfig>(config::Document::from_file((dir / "codec.yaml").string())), config)
             .empty();
}

void train(const Options& o) {
  if (o.threads > 0) at::set_num_threads(int(o.threads));
  auto config = config::parse<codec::CodecRunConfig>(config::Document::from_file(o.config, o.overrides));
  const bool resumes = o.resume == "auto";
  if (!resumes) check_target(config.dir, o.overwrite);
  std::vector<at::Tensor> epoch, sources;
  int64_t skipped = 0;
  for (const auto& source : config.data.train) {
    const auto pictures = codec::load_pictures(source.path, config.codec.image_size, config.codec.fit);
    skipped += pictures.skipped;
    sources.push_back(pictures.pixels_N3HW);
    epoch.insert(epoch.end(), size_t(source.repeat), pictures.pixels_N3HW);
  }
  const auto pixels = at::cat(epoch);
  const std::string fingerprint = train::fingerprint_pictures(pixels);
  if (resumes && is_made(config, fingerprint)) {
    log::info("codec: ", config.dir, " holds the codec that this training makes: nothing to do");
    train::remove_codec_training(config.dir);  // of a process that ended between its last two steps
    if (o.json) std::cout << io::read_json(std::filesystem::path(config.dir) / "report.json").dump() << "\n";
    return;
  }
  if (resumes) check_target(config.dir, o.overwrite);
  codec::Pictures held_out;
  if (!config.data.eval.empty())
    held_out = codec::load_pictures(config.data.eval, config.codec.image_size, config.codec.fit);
  log::info("codec: ", pixels.size(0), " pictures an epoch, of ", config.codec.image_size, "x", config.codec.image_size,
            " -> ", config.codec.grid(), "x", config.codec.grid(), " codes of ", config.codec.codebook_size);
  train::CodecRun run(config, pixels, o.resume, o.overwrite);
  const auto outcome = run.train();
  if (!outcome.codec) throw CLI::RuntimeError(run::kExitStopped);
  const codec::VqCodec* model = outcome.codec.get();
  io::StagedFolder folder(config.dir);
  const std::filesystem::path& dir = folder.path();
  model->save(dir);
  io::write_file_atomic(dir / "codec.yaml", config::dump(config));
  if (std::filesystem::exists(run.folder() / "metrics.jsonl"))
    io::write_file_atomic(dir / "metrics.jsonl", io::read_file(run.folder() / "metrics.jsonl"));
  io::Json report = {{"codec", config.dir},
                     {"fingerprint", fingerprint},
                     {"seconds", outcome.seconds},
                     {"steps", config.train.steps},
                     {"skipped", skipped + held_out.skipped},
                     {"train", io::Json::array()}};
  log::info("codec: trained in ", format_seconds(outcome.seconds));
  for (size_t i = 0; i < sources.size(); ++i) {
    const auto quality = codec::measure(*model, sources[i]);
    report["train"].push_back(to_json(quality));
    report["train"].back()["path"] = config.data.train[i].path;
    log::info("codec: ", config.data.train[i].path, ": ", to_line(quality));
  }
  if (!held_out.paths.empty()) {
    const auto quality = codec::measure(*model, held_out.pixels_N3HW);
    report["eval"] = to_json(quality);
    log::info("codec: held-out ", config.data.eval, ": ", to_line(quality));
  }
  write_sheet(*model, sources.back(), (dir / "sheet.png").string());
  io::write_json(dir / "report.json", report);
  folder.publish([&] { check_target(config.dir, o.overwrite); });
  run.remove();
  if (o.json) std::cout << report.dump() << "\n";
}

void encode(const Options& o) {
  check_tensor_output(o.output, {"ids"});
  const auto codec = codec::load_codec(o.codec_dir);
  std::vector<at::Tensor> pixels;
  for (const auto& path : o.pictures) pixels.push_back(codec->prepare(io::load_image(path)));
  const auto ids = codec->encode(at::stack(pixels));
  io::save_safetensors(o.output, {{"ids", ids}},
                       {{"codec", codec->architecture()}, {"codebook_size", std::to_string(codec->codebook_size())}});
  if (o.json)
    std::cout << io::Json{{"ids", o.output}, {"pictures", ids.size(0)}, {"codes_per_picture", ids.size(1)}}.dump()
              << "\n";
}

void decode(const Options& o) {
  const auto codec = codec::load_codec(o.codec_dir);
  auto ids = io::SafetensorsFile(o.ids).tensor("ids");
  if (ids.dim() == 1) ids = ids.unsqueeze(0);
  const auto pixels = codec->decode(ids.to(ids.scalar_type() == at::kInt ? at::kLong : ids.scalar_type())).cpu();
  MOEGRAFT_CHECK(pixels.size(0) > 0, o.ids, " holds no picture");
  if (pixels.size(0) == 1) {
    io::save_image(o.output, pixels[0]);
  } else {
    const int64_t columns = o.columns > 0 ? o.columns : int64_t(std::ceil(std::sqrt(double(pixels.size(0)))));
    io::save_image(o.output, io::contact_sheet(pixels.unbind(0), columns));
  }
  if (o.json) std::cout << io::Json{{"image", o.output}, {"pictures", pixels.size(0)}}.dump() << "\n";
}

void eval(const Options& o) {
  const auto codec = codec::load_codec(o.codec_dir);
  const auto pictures = codec::load_pictures(o.images, codec->image_size(), codec->fit());
  const auto quality = codec::measure(*codec, pictures.pixels_N3HW, codec->image_size() > 128 ? 4 : 64);
  if (!o.sheet.empty()) write_sheet(*codec, pictures.pixels_N3HW, o.sheet);
  io::Json report = to_json(quality);
  report["skipped"] = pictures.skipped;
  report["codebook_size"] = codec->codebook_size();
  if (o.json)
    std::cout << report.dump() << "\n";
  else
    std::cout << to_line(quality) << "\n";
}

}  // namespace

void add_codec_command(CLI::App& app) {
  auto* codec = app.add_subcommand("codec", "Image codecs: pictures <-> discrete ids");
  codec->require_subcommand(1);
  auto o = std::make_shared<Options>();

  auto* t = codec->add_subcommand("train", "Train the small VQ codec");
  t->add_option("-c,--config", o->config, "YAML file; moegraft config codec lists its keys")->required();
  t->add_option("--set", o->overrides, "Override a key: --set train.steps=200")->allow_extra_args(false);
  t->add_option("--threads", o->threads, "CPU threads")->check(CLI::Range(1, 4096));
  t->add_option("--resume", o->resume,
                "none: a new training; auto: continue one that was interrupted; a codec that this config has made of "
                "these pictures is kept")
      ->check(CLI::IsMember({"none", "auto"}))
      ->capture_default_str();
  t->add_flag(
      "--overwrite", o->overwrite,
      "Replace the codec in dir, when the new one is whole, and a training that was interrupted and is not resumed");
  t->add_flag("--json", o->json, "Print the report as JSON");
  t->footer(
      "Example: moegraft codec train -c configs/quickstart/codec.yaml --set train.steps=500 --resume auto\n"
      "Writes config.json, model.safetensors, codec.yaml, metrics.jsonl, report.json and sheet.png (original | "
      "reconstruction pairs) when it is done. Until then checkpoints and metrics\n"
      "are in DIR.training, from where --resume auto continues exactly.\n"
      "Exit codes: 0 finished, 1 failed, 2 bad usage or config, 3 stopped by a signal with everything saved.");
  t->callback([o] { train(*o); });

  auto* e = codec->add_subcommand("encode", "Pictures -> ids");
  e->add_option("codec", o->codec_dir, "Codec folder")->required();
  e->add_option("--image", o->pictures, "PNG or JPEG files")->required();
  e->add_option("-o,--output", o->output, "safetensors file with ids int64 [pictures, codes]")->required();
  e->add_flag("--json", o->json, "Print a JSON object");
  e->footer("Example: moegraft codec encode models/codec --image heart.png pizza.jpg -o ids.safetensors");
  e->callback([o] { encode(*o); });

  auto* d = codec->add_subcommand("decode", "Ids -> a picture, or a contact sheet of several");
  d->add_option("codec", o->codec_dir, "Codec folder")->required();
  d->add_option("--ids", o->ids, "safetensors file with ids [pictures, codes]")->required();
  d->add_option("-o,--output", o->output, "PNG or JPEG file")->required();
  d->add_option("--columns", o->columns, "Columns of the contact sheet")->check(CLI::Range(1, 1000));
  d->add_flag("--json", o->json, "Print a JSON object");
  d->footer("Example: moegraft codec decode models/codec --ids ids.safetensors -o out.png");
  d->callback([o] { decode(*o); });

  auto* v = codec->add_subcommand("eval", "How well a codec reproduces pictures: PSNR, code use");
  v->add_option("codec", o->codec_dir, "Codec folder")->required();
  v->add_option("--images", o->images,
                "Folder of PNG/JPEG files, or a manifest of any kind that `data prepare shards` reads")
      ->required();
  v->add_option("--sheet", o->sheet, "Write a contact sheet of original | reconstruction pairs here");
  v->add_flag("--json", o->json, "Print a JSON object");
  v->footer("Example: moegraft codec eval models/codec --images data/emoji/eval.jsonl --sheet sheet.png --json");
  v->callback([o] { eval(*o); });
}

}  // namespace moegraft::tools
