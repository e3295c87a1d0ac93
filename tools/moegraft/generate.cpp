// moegraft generate: pictures and text from prompts.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/text.h"
#include "moegraft/config/config.h"
#include "moegraft/generate/images.h"
#include "moegraft/generate/text.h"
#include "moegraft/io/image.h"

namespace moegraft::tools {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Options {
  std::string model, prompt_file, image = "out.png", dtype, quantize, device, checkpoint = "latest";
  std::vector<std::string> prompts, pictures;
  bool text = false, json = false, cuda_graphs = false;
  generate::ImageOptions images;
  int64_t max_tokens = 128, columns = 0;
};

std::vector<std::string> read_prompts(const Options& o) {
  std::vector<std::string> prompts = o.prompts;
  if (!o.prompt_file.empty()) {
    std::ifstream file;
    if (o.prompt_file != "-") {
      MOEGRAFT_CHECK_USAGE(!fs::is_directory(o.prompt_file), "--prompts: ", o.prompt_file,
                           " is a folder; give a file with a prompt a line");
      file.open(o.prompt_file);
      MOEGRAFT_CHECK(file, o.prompt_file, ": cannot read the prompts");
    }
    std::istream& in = o.prompt_file == "-" ? std::cin : file;
    for (std::string line; std::getline(in, line);)
      if (line = trim(line); !line.empty()) prompts.push_back(line);
  }
  MOEGRAFT_CHECK_USAGE(!prompts.empty(), o.prompt_file.empty() ? "generate: give a --prompt or --prompts FILE"
                                                               : "generate: no prompt in " + o.prompt_file);
  return prompts;
}

std::vector<generate::Prompt> parse(const Options& o, const std::vector<std::string>& texts,
                                    const graft::GraftedModel& model) {
  std::vector<generate::Prompt> prompts;
  for (const auto& text : texts) {
    generate::Prompt prompt = generate::parse_prompt(text, model.vocabulary);
    std::error_code none;  // a file of just that name is what is meant
    for (auto& part : prompt)
      if (!part.image.empty() && !fs::exists(part.image, none))
        part.image = config::expand_path(part.image.string(), "--prompt");
    for (auto it = o.pictures.rbegin(); it != o.pictures.rend(); ++it) {
      const auto& tokens = generate::find_modality(model, o.images.modality);
      prompt.insert(prompt.begin(), {tokens.name, "", *it, {}});
    }
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

void finish(Json& out, double seconds, int64_t tokens) {
  out["seconds"] = seconds;
  out["tokens"] = tokens;
  out["tokens_per_s"] = seconds > 0 ? double(tokens) / seconds : 0.0;
}

std::string print(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

Json settings(const Options& o, const graft::GraftedModel& model) {
  const auto& s = o.images.sampling;
  return {{"model", o.model}, {"step", model.step}, {"seed", o.images.seed}, {"temperature", s.temperature},
          {"top_k", s.top_k}, {"top_p", s.top_p}};
}

// out.png -> out-3.png
fs::path numbered(const fs::path& path, size_t number) {
  return path.parent_path() / (path.stem().string() + "-" + std::to_string(number) + path.extension().string());
}

void check_target(const fs::path& path) {
  const std::string extension = lower_case(path.extension().string());
  MOEGRAFT_CHECK_USAGE(extension == ".png" || extension == ".jpg" || extension == ".jpeg",
                       "--image must end in .png or .jpg, got ", path.string());
  const fs::path folder = path.parent_path();
  std::error_code error;
  if (!folder.empty()) fs::create_directories(folder, error);
  MOEGRAFT_CHECK(!error, "cannot make the folder of --image, ", folder.string(), ": ", error.message());
}

void draw(const Options& o, const graft::GraftedModel& model, const std::vector<std::string>& texts) {
  const fs::path target = o.image;
  check_target(target);
  const auto prompts = parse(o, texts, model);
  const auto& tokens = generate::find_modality(model, o.images.modality);
  generate::ImageOptions options = o.images;
  if (options.cfg != 1 && model.config && model.config->data.caption_dropout == 0)
    log::warning("--cfg ", options.cfg,
                 ": the run was trained with data.caption_dropout 0, so it never learnt the unconditional pictures "
                 "that guidance leads away from");
  const auto start = std::chrono::steady_clock::now();
  Progress progress("drawing", static_cast<int64_t>(prompts.size()) * options.n * tokens.item_length);
  options.on_progress = [&](int64_t done, int64_t) {
    progress.update(done, format_count(double(done) / std::max(1e-9, seconds_since(start))) + " codes/s");
  };
  const auto results = generate::generate_images(model, prompts, options);
  const double seconds = seconds_since(start);
  progress.finish();

  Json out = settings(o, model);
  out["cfg"] = options.cfg;
  out["images"] = Json::array();
  std::vector<at::Tensor> pictures;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto& r = results[i];
    const fs::path file = results.size() == 1 ? target : numbered(target, i);
    io::save_image(file, r.pixels_3HW);
    pictures.push_back(r.pixels_3HW);
    const int64_t* ids = r.ids_L.const_data_ptr<int64_t>();
    out["images"].push_back({{"prompt", texts[r.prompt]},
                             {"index", r.index},
                             {"file", file.string()},
                             {"ids", std::vector<int64_t>(ids, ids + r.ids_L.numel())}});
    if (!o.json) std::cout << file.string() << "\t" << texts[r.prompt] << "\n";
  }
  if (results.size() > 1) {
    // A row per prompt; pictures of one prompt, or one of each of many, as a square.
    int64_t columns = o.columns > 0 ? o.columns : options.n;
    if (o.columns <= 0 && (prompts.size() == 1 || options.n == 1))
      columns = static_cast<int64_t>(std::ceil(std::sqrt(double(results.size()))));
    io::save_image(target, io::contact_sheet(pictures, columns));
    out["sheet"] = target.string();
    if (!o.json) std::cout << target.string() << "\tall " << results.size() << " pictures\n";
  }
  finish(out, seconds, static_cast<int64_t>(results.size()) * tokens.item_length);
  if (o.json) std::cout << print(out) << std::endl;
}

void write(const Options& o, const graft::GraftedModel& model, const std::vector<std::string>& texts) {
  generate::TextOptions options;
  options.max_tokens = o.max_tokens;
  options.n = o.images.n;
  options.sampling = o.images.sampling;
  options.seed = o.images.seed;
  options.steps = o.images.steps;
  const auto prompts = parse(o, texts, model);
  int64_t open_prompt = -1, open_index = -1;
  if (!o.json)
    options.on_text = [&](int64_t prompt, int64_t index, std::string_view text) {
      if (prompt != open_prompt || index != open_index) std::cout << (open_prompt < 0 ? "" : "\n\n") << texts[prompt];
      open_prompt = prompt, open_index = index;
      std::cout << text << std::flush;
    };
  const auto start = std::chrono::steady_clock::now();
  const auto results = generate::generate_text(model, prompts, options);
  const double seconds = seconds_since(start);
  Json out = settings(o, model);
  out["texts"] = Json::array();
  int64_t tokens = 0;
  for (const auto& r : results) {
    out["texts"].push_back({{"prompt", texts[r.prompt]},
                            {"index", r.index},
                            {"text", r.text},
                            {"ids", r.ids},
                            {"stopped_by", r.ended ? "eos" : "max_tokens"}});
    tokens += static_cast<int64_t>(r.ids.size());
  }
  finish(out, seconds, tokens);
  if (o.json) {
    std::cout << print(out) << std::endl;
    return;
  }
  std::cout << (open_prompt < 0 ? "" : "\n") << std::flush;
  for (const auto& r : results)
    if (r.ids.empty())
      std::cout << texts[r.prompt] << "\n",
          log::warning("nothing was written for \"", shortened(texts[r.prompt], 60),
                       "\": the model ends there (an instruct model expects its chat format)");
}

void run(const Options& o) {
  const auto texts = read_prompts(o);
  o.images.sampling.validate();
  graft::OpenOptions open;
  if (!o.dtype.empty()) open.dtype = graft::parse_dtype(o.dtype);
  if (!o.quantize.empty()) open.quantize = config::parse_choice<model::Quantize>("--quantize", o.quantize);
  if (!o.device.empty()) open.device = config::parse_choice<config::Device>("--device", o.device);
  open.checkpoint = o.checkpoint;
  const graft::GraftedModel model = graft::open_model(o.model, open);
  if (o.text)
    write(o, model, texts);
  else
    draw(o, model, texts);
}

}  // namespace

void add_generate_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  auto* command = app.add_subcommand("generate", "Draw pictures or write text from prompts");
  command->footer(
      "Examples:\n  moegraft generate runs/emoji --prompt 'a red heart' --image heart.png\n"
      "  moegraft generate runs/emoji --prompt pizza --prompt dog --n 4 --cfg 3 --temperature 0.7 --image sheet.png   "
      "# sheet.png and sheet-0.png, …\n"
      "  moegraft generate runs/emoji --prompt 'like this <image:cat.png> but smiling' --image out.png\n"
      "  moegraft generate models/base --text --prompt 'a heart is' --max-tokens 40");
  command->add_option("model", o->model, "Run or model folder")->required();
  command
      ->add_option("--prompt", o->prompts,
                   "What to draw, or text to go on from; repeat for several. <image:FILE> puts a picture into it")
      ->allow_extra_args(false);
  command->add_option("--prompts", o->prompt_file, "File with a prompt a line (- is standard input)");
  command->add_option("--with-image", o->pictures, "A picture before every prompt; repeat for several")
      ->allow_extra_args(false);
  command
      ->add_option("--image", o->image,
                   "Picture to write; several become NAME-0.png, NAME-1.png, … and NAME.png their contact sheet")
      ->capture_default_str();
  command->add_option("--n", o->images.n, "Pictures or texts per prompt")
      ->check(CLI::Range(int64_t{1}, int64_t{1000000}))
      ->capture_default_str();
  command->add_option("--cfg", o->images.cfg, "Classifier-free guidance; 1: off. Needs a run with data.caption_dropout")
      ->capture_default_str();
  command->add_option("--temperature", o->images.sampling.temperature, "0: always the likeliest")
      ->capture_default_str();
  command->add_option("--top-k", o->images.sampling.top_k, "Draw among so many; 0: off")->capture_default_str();
  command->add_option("--top-p", o->images.sampling.top_p, "Draw among the likeliest of this total probability; 1: off")
      ->capture_default_str();
  command->add_option("--seed", o->images.seed, "Picture i of a prompt depends on the seed alone")
      ->check(not_negative())
      ->capture_default_str();
  command->add_option("--modality", o->images.modality, "What to draw, where a model has several modalities");
  command->add_option("--max-batch", o->images.max_batch, "Pictures decoded together at most")->capture_default_str();
  command->add_option("--columns", o->columns, "Columns of the contact sheet; 0: by itself")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  command->add_flag("--text", o->text, "Write text instead of drawing");
  command->add_option("--max-tokens", o->max_tokens, "Longest text")->capture_default_str();
  command->add_option("--checkpoint", o->checkpoint, "latest, best, or a step")->capture_default_str();
  command->add_option("--dtype", o->dtype, "float32 or bfloat16 (default: the run's)");
  command->add_option("--quantize", o->quantize,
                      "How the base's matrices are stored: none or q8_0 (default: the run's)");
  command->add_option("--device", o->device, "auto, cpu or cuda (default: the run's)");
  command->add_flag("--cuda-graphs", o->cuda_graphs,
                    "Record a step after the prompt once and replay it: fewer launches (bf16 on a Hopper GPU; not "
                    "tried on a card yet)");
  command->add_flag("--json", o->json,
                    "One JSON object: per picture prompt, index, file and ids; seconds, tokens_per_s");
  command->callback([o] {
    if (o->cuda_graphs) o->images.steps = generate::DecodeSteps::recorded;
    run(*o);
  });
}

}  // namespace moegraft::tools
