#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <map>
#include <set>
#include <thread>

#include "directory.h"
#include "format.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/kernels/current_device.h"

namespace fs = std::filesystem;

namespace moegraft::checkpoint {
namespace {

using Clock = std::chrono::steady_clock;
// A writer that goes away (the training failed, most likely because a rank died) gives the others' last files this
// long.
constexpr auto kGrace = std::chrono::seconds(5);
constexpr const char* kDone = "done";

struct Save {
  int64_t step = 0;
  Parts parameters, optimizer;
  std::string state;
  std::optional<double> measure;
  fs::path target, fresh;
  std::string key;                 // of this save's posts
  std::vector<c10::Event> copied;  // one per device
  Clock::time_point start = Clock::now();
};

// A rank's post: its files, or what stopped it.
std::string to_post(const std::map<std::string, FileEntry>& files, const std::string& error) {
  io::Json json = {{"files", io::Json::object()}, {"error", error}};
  for (const auto& [name, file] : files) json["files"][name] = {{"size", file.size}, {"checksum", file.checksum}};
  return json.dump();
}

void write_tensors(const fs::path& path, const Parts& parts, bool may_be_sliced) {
  io::TensorMap tensors;
  std::map<std::string, Slice> slices;
  for (const auto& part : parts) {
    tensors[part.name] = part.tensor;
    if (part.total_rows > 0 && part.tensor.size(0) < part.total_rows)
      slices[part.name] = {part.first_row, part.total_rows};
  }
  MOEGRAFT_INVARIANT(may_be_sliced || slices.empty(), slices.begin()->first,
                     " is a slice, and no other process writes the rest");
  auto metadata = slice_metadata(slices);
  metadata["format"] = "pt";
  io::save_safetensors(path, tensors, metadata);
}

}  // namespace

struct CheckpointWriter::Impl {
  fs::path root;
  CheckpointConfig config;
  bool lower_is_better;
  Peers peers;
  std::thread thread;
  std::exception_ptr error;  // of the thread: read after joining it
  std::atomic<bool> leaving{false};
  std::map<std::string, at::Tensor> parameter_copies, optimizer_copies;
  int64_t saves = 0, bytes = 0;
  double stall_seconds = 0;
  std::atomic<double> write_seconds{0};

  bool first() const { return peers.rank == 0; }
  std::string prefix() const { return detail::concat("checkpoint/", peers.attempt, "/"); }

  // Polls until `seen` gives true; false after the timeout.
  bool wait_for(const std::function<bool()>& seen) const {
    auto deadline = Clock::now() + peers.timeout;
    auto pause = std::chrono::milliseconds(2);
    bool was_leaving = false;
    while (!seen()) {
      if (leaving && !was_leaving) was_leaving = true, deadline = std::min(deadline, Clock::now() + kGrace);
      if (Clock::now() >= deadline) return false;
      std::this_thread::sleep_for(pause);
      pause = std::min(pause * 2, std::chrono::milliseconds(100));
    }
    return true;
  }
  // A process that is ending, since another one failed, waits only shortly.
  std::string patience() const {
    return leaving ? "the moment that an ending process waits"
                   : detail::concat(std::chrono::duration<double>(peers.timeout).count(), " s");
  }

  void join() {
    if (thread.joinable()) thread.join();
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }

  // Buffers stay for the next save: fresh memory would cost page faults, and page-locked memory is slow to get.
  void copy_to_host(Parts& parts, std::map<std::string, at::Tensor>& copies, std::vector<c10::Device>& devices) const {
    for (auto& part : parts) {
      const at::Tensor from = part.tensor.detach();
      const bool pinned = !from.is_cpu();
      at::Tensor& copy = copies[part.name];
      if (!copy.defined() || copy.sizes() != from.sizes() || copy.scalar_type() != from.scalar_type() ||
          copy.is_pinned() != pinned)
        copy = at::empty(from.sizes(), at::TensorOptions(from.scalar_type()).pinned_memory(pinned));
      copy.copy_(from, /*non_blocking=*/true);
      if (pinned && std::find(devices.begin(), devices.end(), from.device()) == devices.end())
        devices.push_back(from.device());
      part.tensor = copy;
    }
  }

  void run(Save& save) {
    try {
      if (peers.size == 1)
        write_alone(save);
      else
        write_with_others(save);
    } catch (const std::exception& e) {
      fail<UserError>("cannot save the checkpoint ", save.target.string(), ": ", e.what(),
                      " (earlier checkpoints are untouched; mend the cause and continue with --resume auto)");
    }
    if (first()) remove_old(root, config.keep, config.keep_best, lower_is_better);
    write_seconds = seconds_since(save.start);
  }

  void write_alone(Save& save) {
    try {
      fs::remove_all(save.fresh);
      fs::create_directory(save.fresh);
      publish(save, write_files(save));
    } catch (...) {
      std::error_code ignored;
      fs::remove_all(save.fresh, ignored);
      throw;
    }
  }

  std::map<std::string, FileEntry> write_files(Save& save) {
    for (const auto& event : save.copied) event.synchronize();
    std::map<std::string, FileEntry> files;
    for (const auto& [kind, parts] :
         {std::pair(Kind::adapter, &save.parameters), std::pair(Kind::optimizer, &save.optimizer)}) {
      const auto name = tensor_file(kind, peers.rank, peers.size);
      write_tensors(save.fresh / name, *parts, peers.size > 1);
      files[name] = describe_file(save.fresh / name);
    }
    if (first()) {
      io::write_file_atomic(save.fresh / kState, save.state);
      files[kState] = describe_file(save.fresh / kState);
    }
    return files;
  }

  void publish(const Save& save, std::map<std::string, FileEntry> files) {
    write_manifest(save.fresh, {save.step, peers.size, save.measure, std::move(files)});
    io::sync_directory(save.fresh);
    move_into_place(save.fresh, save.target);
    io::sync_directory(root);
  }

  void write_with_others(Save& save) {
    if (first()) {
      std::string error;
      try {
        fs::create_directories(save.fresh);
        gather_and_publish(save, write_files(save));
      } catch (const std::exception& e) {
        error = e.what();
        std::error_code ignored;
        fs::remove_all(save.fresh, ignored);
      }
      post(save.key + kDone, error);
      MOEGRAFT_CHECK(error.empty(), error);
      return;
    }
    try {
      // Not before rank 0 has removed what an earlier attempt left: it would take this for a part of that.
      MOEGRAFT_CHECK(wait_for([&] { return peers.look(prefix() + "ready").has_value(); }),
                     "rank 0 was not ready to write within ", patience());
      fs::create_directories(save.fresh);
      const auto files = write_files(save);
      io::sync_directory(save.fresh);
      peers.post(detail::concat(save.key, peers.rank), to_post(files, ""));
    } catch (const std::exception& e) {
      // Where rank 0 failed first, its clearing up is what failed here.
      const auto outcome = look(save.key + kDone);
      const std::string error = outcome && !outcome->empty() ? *outcome : e.what();
      post(detail::concat(save.key, peers.rank), to_post({}, error));
      fail<UserError>(error);
    }
    wait_for_publication(save);
  }

  // Where an error is on its way already, or nothing depends on the answer: a dictionary out of reach changes nothing.
  void post(const std::string& key, const std::string& value) const {
    try {
      peers.post(key, value);
    } catch (const std::exception& e) { log::debug("checkpoint: cannot tell the other ranks: ", e.what()); }
  }
  std::optional<std::string> look(const std::string& key) const {
    try {
      return peers.look(key);
    } catch (const std::exception&) { return {}; }
  }

  void wait_for_publication(const Save& save) const {
    std::optional<std::string> outcome;
    const bool told = wait_for([&] {
      try {
        outcome = peers.look(save.key + kDone);
      } catch (const std::exception&) {
        // Rank 0 may have been the dictionary's server, and be done.
        if (!fs::exists(save.fresh) && fs::exists(save.target / kManifest)) outcome = "";
        if (!outcome) throw;
      }
      return outcome.has_value();
    });
    MOEGRAFT_CHECK(told, "rank 0 did not say within ", patience(), " that it is written");
    MOEGRAFT_CHECK(outcome->empty(), *outcome);
  }

  void gather_and_publish(const Save& save, std::map<std::string, FileEntry> files) {
    std::set<int64_t> missing;
    for (int64_t rank = 1; rank < peers.size; ++rank) missing.insert(rank);
    const auto take_posts = [&] {
      for (auto rank = missing.begin(); rank != missing.end();) {
        const auto post = peers.look(detail::concat(save.key, *rank));
        if (!post) {
          ++rank;
          continue;
        }
        const auto json = io::Json::parse(*post);
        const auto error = json.at("error").get<std::string>();
        MOEGRAFT_CHECK(error.empty(), "rank ", *rank, ": ", error);
        for (const auto& [name, file] : json.at("files").items())
          files[name] = {file.at("size").get<uint64_t>(), file.at("checksum").get<std::string>(), {}};
        rank = missing.erase(rank);
      }
      return missing.empty();
    };
    if (!wait_for(take_posts)) {
      std::vector<std::string> names;
      for (const int64_t rank : missing) names.push_back(std::to_string(rank));
      fail<UserError>(names.size() == 1 ? "rank " : "ranks ", moegraft::join(names, ", "),
                      " did not finish writing within ", patience());
    }
    for (auto& [name, file] : files) {
      const auto path = save.fresh / name;
      std::error_code ignored;
      MOEGRAFT_CHECK(
          fs::file_size(path, ignored) == file.size, path.string(),
          " was written by another rank and is not here: run.dir must lie on a file system that all machines share");
      if (name != kState) file.slices = read_slices(path);
    }
    // A fault of the layout must show now, not when the run is to be resumed.
    const Manifest manifest{save.step, peers.size, save.measure, files};
    for (const auto kind : {Kind::adapter, Kind::optimizer}) Assembly(save.fresh, manifest, kind);
    publish(save, std::move(files));
  }
};

CheckpointWriter::CheckpointWriter(fs::path root, CheckpointConfig config, bool lower_is_better,
                                   std::shared_ptr<distributed::World> world)
    : CheckpointWriter(std::move(root), config, lower_is_better, peers_of(std::move(world))) {}

CheckpointWriter::CheckpointWriter(fs::path root, CheckpointConfig config, bool lower_is_better, Peers peers)
    : impl_(std::make_unique<Impl>()) {
  impl_->root = std::move(root), impl_->config = config, impl_->lower_is_better = lower_is_better,
  impl_->peers = std::move(peers);
  std::error_code error;
  fs::create_directories(impl_->root, error);
  MOEGRAFT_CHECK(!error, "cannot make the folder ", impl_->root.string(), ": ", error.message());
  if (!impl_->first()) return;
  remove_leftovers(impl_->root);
  if (impl_->peers.size > 1) impl_->peers.post(impl_->prefix() + "ready", "1");
}

CheckpointWriter::~CheckpointWriter() {
  impl_->leaving = true;
  try {
    impl_->join();
  } catch (const std::exception& e) { log::error(e.what()); }
}

fs::path CheckpointWriter::save(int64_t step, const Parts& parameters, const Parts& optimizer, const std::string& state,
                                std::optional<double> measure) {
  const auto start = Clock::now();
  auto& w = *impl_;
  w.join();
  auto save = std::make_shared<Save>();
  if (measure && std::isfinite(*measure)) save->measure = measure;
  save->step = step, save->parameters = parameters, save->optimizer = optimizer, save->state = state;
  save->target = w.root / step_name(step);
  save->key = detail::concat(w.prefix(), ++w.saves, "/", step, "/");
  save->fresh = w.root / (kWriting + step_name(step) +
                          (w.peers.size > 1 ? detail::concat("-", w.peers.attempt, "-", w.saves) : ""));
  w.bytes = 0;
  for (const auto* parts : {&parameters, &optimizer})
    for (const auto& part : *parts) w.bytes += int64_t(part.tensor.nbytes());
  if (w.config.async) {
    at::NoGradGuard no_grad;
    std::vector<c10::Device> devices;
    w.copy_to_host(save->parameters, w.parameter_copies, devices);
    w.copy_to_host(save->optimizer, w.optimizer_copies, devices);
    for (const auto device : devices) {
      save->copied.emplace_back(device.type());
      save->copied.back().record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    }
    const c10::Device device = devices.empty() ? c10::Device(at::kCPU) : devices.front();
    w.thread = std::thread([&w, save, device] {
      kernels::make_current(device);
      try {
        w.run(*save);
      } catch (...) { w.error = std::current_exception(); }
    });
  } else {
    w.run(*save);
  }
  w.stall_seconds = seconds_since(start);
  return save->target;
}

void CheckpointWriter::wait() { impl_->join(); }

void CheckpointWriter::set_aside_after(int64_t step) {
  wait();
  if (!impl_->first()) return;
  for (const auto& dir : list_checkpoints(impl_->root))
    if (*step_of(dir) > step) set_aside(dir);
  io::sync_directory(impl_->root);
}

double CheckpointWriter::last_stall_seconds() const { return impl_->stall_seconds; }
double CheckpointWriter::last_write_seconds() const { return impl_->write_seconds; }
int64_t CheckpointWriter::last_bytes() const { return impl_->bytes; }

int64_t CheckpointWriter::buffer_bytes() const {
  int64_t bytes = 0;
  for (const auto* copies : {&impl_->parameter_copies, &impl_->optimizer_copies})
    for (const auto& [name, copy] : *copies) bytes += int64_t(copy.nbytes());
  return bytes;
}

}  // namespace moegraft::checkpoint
