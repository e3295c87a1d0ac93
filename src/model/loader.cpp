#include "loader.h"

#include "libtorch.h"

#include <algorithm>
#include <mutex>

#include "family.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/io/json.h"

namespace moegraft::model {

namespace fs = std::filesystem;

void warn_once(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(line).second) log::warning(line);
}

TensorSource::TensorSource(const fs::path& dir) : dir_(dir) {
  const fs::path index = dir / "model.safetensors.index.json", single = dir / "model.safetensors";
  if (fs::exists(index) && !fs::exists(single)) {
    const io::Json j = io::read_json(index);
    MOEGRAFT_CHECK(j.contains("weight_map") && j.at("weight_map").is_object(), index.string(),
                   ": weight_map is missing");
    std::set<std::string> shards;
    for (const auto& [name, file] : j.at("weight_map").items()) {
      MOEGRAFT_CHECK(file.is_string(), index.string(), ": weight_map.", name, " must name a file");
      const std::string shard = file.get<std::string>();
      MOEGRAFT_CHECK(fs::path(shard).filename() == shard, index.string(), ": '", shard,
                     "' must be a file beside the index");
      shards.insert(shard);
    }
    for (const auto& shard : shards) open(dir / shard);
    for (const auto& [name, file] : j.at("weight_map").items())
      MOEGRAFT_CHECK(where_.count(name), (dir / file.get<std::string>()).string(), " does not hold ", name,
                     ", which the index places there");
  } else {
    MOEGRAFT_CHECK(fs::exists(single) ||
                       !(fs::exists(dir / "pytorch_model.bin") || fs::exists(dir / "pytorch_model.bin.index.json")),
                   dir.string(),
                   " holds pytorch_model.bin only; expected safetensors: AutoModelForCausalLM.from_pretrained(DIR, "
                   "dtype=\"auto\").save_pretrained(DIR) in transformers writes them");
    MOEGRAFT_CHECK(fs::exists(single), dir.string(),
                   " holds neither model.safetensors nor model.safetensors.index.json");
    if (fs::exists(index))
      warn_once(dir.string() +
                " holds model.safetensors and an index of shards; the single file is read, as transformers does");
    open(single);
  }
}

at::Tensor TensorSource::tensor(const std::string& name) const {
  const auto it = find(name);
  return files_[it->second].tensor(it->first);
}

std::optional<io::FileRange> TensorSource::range(const std::string& name) const {
  const auto it = find(name);
  if (!files_[it->second].is_view(it->first)) return {};
  return files_[it->second].range(it->first);
}

std::string TensorSource::stored_name(const std::string& name) const {
  const auto it = find(name);
  return it == where_.end() ? std::string() : it->first;
}

bool TensorSource::holds(const at::Tensor& t) const {
  return std::any_of(files_.begin(), files_.end(), [&](const auto& file) { return file.holds(t); });
}

void TensorSource::release(const at::Tensor& t) const {
  for (const auto& file : files_)
    if (file.release_pages(t)) return;
}

std::vector<std::string> TensorSource::names() const {
  std::vector<std::string> out;
  for (const auto& [name, file] : where_) out.push_back(name);
  return out;
}

void TensorSource::open(const fs::path& file) {
  files_.emplace_back(file);
  for (const auto& name : files_.back().names()) where_[name] = files_.size() - 1;
}

TensorSource::Where::const_iterator TensorSource::find(const std::string& name) const {
  auto it = where_.find(name);
  if (it != where_.end()) return it;
  for (const auto& other : other_names(name))
    if (it = where_.find(other); it != where_.end()) return it;
  return it;
}

Loader::Loader(const TensorSource& source, const LoadOptions& options, std::string where)
    : source_(source), options_(options), where_(std::move(where)) {
  if (options.staging)
    staged_.emplace(options.device, *options.staging);
  else if (options.device.is_cuda())
    staged_.emplace(options.device, Staging());
}

at::Tensor Loader::take(const std::string& name, const std::vector<int64_t>& shape, int64_t first, int64_t count,
                        at::Tensor into) {
  if (!source_.contains(name)) {
    problem(name + " is missing");
    return {};
  }
  use(name);
  at::Tensor t = source_.tensor(name);
  if (t.sizes() != at::IntArrayRef(shape)) {
    problem(detail::concat(name, " must have shape ", shape, ", got ", t.sizes().vec()));
    return {};
  }
  if (!at::isFloatingType(t.scalar_type()) || t.element_size() < 2) {
    problem(
        detail::concat(name, " has dtype ", c10::toString(t.scalar_type()), "; expected float32, bfloat16 or float16"));
    return {};
  }
  if (count > 0) t = t.narrow(0, first, count);
  if (staged_ && !on_cpu_) {
    if (!into.defined()) into = dtype_ ? room(t.sizes()) : at::empty(t.sizes(), t.options().device(options_.device));
    if (auto range = source_.range(name)) {
      if (count > 0)
        range->offset += int64_t(first * t.stride(0) * t.element_size()), range->bytes = int64_t(t.nbytes());
      staged_->add(std::move(*range), t.scalar_type(), into);
    } else {
      into.copy_(t);
    }
    return into;
  }
  const at::Tensor out = t.to(on_cpu_ ? at::Device(at::kCPU) : options_.device, dtype_.value_or(t.scalar_type()));
  if (!out.is_alias_of(t)) source_.release(t);  // read once, to be converted or copied
  return out;
}

bool Loader::same(const std::string& a, const std::string& b) const {
  return at::equal(source_.tensor(a).to(options_.dtype), source_.tensor(b).to(options_.dtype));
}

void Loader::problem(const std::string& text) {
  if (++count_ <= 8) problems_.push_back(text);
}

void Loader::check_rest(int64_t num_layers) {
  std::vector<std::string> unexpected;
  for (const auto& name : source_.names()) {
    if (used_.count(name) || name.find("rotary_emb.inv_freq") != std::string::npos) continue;
    unexpected.push_back(name);
    const std::string layers = name.starts_with("layers.") ? "layers." : "model.layers.";
    const int64_t layer = name.starts_with(layers) ? std::atoll(name.c_str() + layers.size()) : 0;
    if (layer >= num_layers)
      problem(detail::concat(name, " lies beyond num_hidden_layers ", num_layers, " of config.json"));
  }
  constexpr size_t kShown = 4;
  const size_t shown = std::min(kShown, unexpected.size());
  if (clean() && shown)
    warn_once(detail::concat(where_, ": ", unexpected.size(), " tensors that the model does not have are not used: ",
                             join({unexpected.begin(), unexpected.begin() + int64_t(shown)}, ", "),
                             unexpected.size() > shown ? ", …" : ""));
}

void Loader::finish() {
  if (count_ > 0) {
    std::string hint;
    for (const auto& name : source_.names())
      if (const std::string tail = ".embed_tokens.weight"; name.ends_with(tail) && name != "model" + tail)
        hint = "; the file's names begin with '" + name.substr(0, name.size() - tail.size() + 1) +
               "': save the language model of this wrapper alone";
    fail<UserError>(where_, ": ", join(problems_, "; "),
                    count_ > 8 ? detail::concat("; and ", count_ - 8, " more") : std::string(), hint);
  }
  if (staged_) staged_->run(options_.progress ? "loading " + source_.dir().filename().string() : "");
}

}  // namespace moegraft::model
