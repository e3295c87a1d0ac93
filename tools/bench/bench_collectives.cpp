// moegraft bench collectives: what the links between the processes carry. Under a launcher; one process alone sends its
// messages to itself.
#include "libtorch.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>

#include "bench.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::tools::bench {
namespace {

struct CollectivesOptions {
  std::string device = "cpu";
  std::vector<std::string> sizes{"1K", "16K", "256K", "2M", "16M", "64M"}, only;
  int64_t rounds = 7, threads = 0;
  bool json = false;
};

// bytes: of the message, as in the project's counters: what all_reduce and broadcast are given, what all_gather
// collects, what leaves a process in all_to_all.
struct Collective {
  std::string name;
  std::function<void(distributed::Communicator&)> run;
  std::function<bool()> is_right;
  double bytes = 0;
  double on_links = 0;  // of the busiest process, in its busier direction: bus bandwidth counts these
};

int64_t parse_size(const std::string& text) {
  size_t end = 0;
  double value = 0;
  try {
    value = std::stod(text, &end);
  } catch (const std::exception&) {}
  const std::string unit = text.substr(end);
  const double factor = unit.empty() || unit == "B"    ? 1
                        : unit == "K" || unit == "KiB" ? 1 << 10
                        : unit == "M" || unit == "MiB" ? 1 << 20
                        : unit == "G" || unit == "GiB" ? 1 << 30
                                                       : 0;
  MOEGRAFT_CHECK_USAGE(value * factor >= 1 && value * factor <= double(int64_t{1} << 34),
                       "--sizes: bytes such as 65536, 64K or 16M, at most 16G, got '", text, "'");
  return int64_t(value * factor);
}

// Rows of 16 bytes; sizes are rounded so that they divide evenly. skewed: half of everything goes to process 0, the
// rest is spread over the others.
Collective all_to_all(bool skewed, int64_t size, int64_t n, int64_t rank, at::TensorOptions options) {
  const int64_t rows = std::max<int64_t>(size / 16 / (2 * n), 1) * 2 * n;
  std::vector<int64_t> to(size_t(n), rows / n);
  if (skewed && n > 1) {
    std::fill(to.begin(), to.end(), rows / 2 / (n - 1));
    to[0] = rows - (n - 1) * to[1];
  }
  const std::vector<int64_t> from(size_t(n), to[size_t(rank)]);  // everybody sends alike
  const at::Tensor in = at::full({rows, 4}, double(rank), options);
  at::Tensor out = at::empty({n * to[size_t(rank)], 4}, options);
  const double most =
      double(std::max((n - 1) * to[0], rows - to[size_t(n - 1)]));  // into process 0, or out of the last one
  return {skewed ? "all_to_all skewed" : "all_to_all",
          [=](distributed::Communicator& c) mutable { c.all_to_all(out, in, from, to, "bench").wait(); },
          [=] { return out.sum(at::kDouble).item<double>() == 4.0 * double(to[size_t(rank)] * (n * (n - 1) / 2)); },
          16.0 * double(rows), 16.0 * most};
}

std::vector<Collective> make_collectives(int64_t size, int64_t n, int64_t rank, at::Device device) {
  const auto options = at::TensorOptions(at::kFloat).device(device);
  const int64_t each = std::max<int64_t>(size / 4 / n, 1), whole = each * n;
  const double bytes = 4.0 * double(whole), others = double(n - 1) / double(n), ranks = double(n * (n - 1) / 2);
  std::vector<Collective> all;
  at::Tensor zeros = at::zeros({whole}, options);  // summed in place again and again
  all.push_back({"all_reduce", [=](distributed::Communicator& c) mutable { c.all_reduce(zeros, "bench").wait(); },
                 [=] { return zeros.abs().max().item<double>() == 0; }, bytes, 2 * others * bytes});
  const at::Tensor part = at::full({each}, double(rank), options);
  at::Tensor gathered = at::empty({whole}, options);
  all.push_back(
      {"all_gather", [=](distributed::Communicator& c) mutable { c.all_gather(gathered, part, "bench").wait(); },
       [=] { return gathered.view({n, each}).select(1, 0).sum().item<double>() == ranks; }, bytes, others * bytes});
  all.push_back(all_to_all(false, size, n, rank, options));
  all.push_back(all_to_all(true, size, n, rank, options));
  at::Tensor news = at::full({whole}, double(rank), options);
  all.push_back({"broadcast", [=](distributed::Communicator& c) mutable { c.broadcast(news, n - 1, "bench").wait(); },
                 [=] { return news[0].item<double>() == double(n - 1); }, bytes, n > 1 ? bytes : 0});
  return all;
}

// Seconds of one call on the slowest process: median and best of the rounds. Short ones are repeated within a round, so
// that the clock and the barrier vanish.
std::pair<double, double> time_collective(const Collective& c, distributed::World& world, int64_t rounds,
                                          at::Device device) {
  c.run(world.all());
  synchronize(device);
  MOEGRAFT_INVARIANT(c.is_right(), "bench collectives: wrong result of ", c.name);
  const int64_t repeats = std::clamp(int64_t(double(4 << 20) / c.bytes), int64_t{1}, int64_t{50});
  std::vector<double> seconds;
  for (int64_t i = 0; i < rounds; ++i) {
    world.all().barrier("bench");
    const auto start = Clock::now();
    for (int64_t k = 0; k < repeats; ++k) c.run(world.all());
    synchronize(device);
    double slowest = 0;
    for (const auto& one : world.all().all_gather_numbers({seconds_since(start) / double(repeats)}, "figures"))
      slowest = std::max(slowest, one[0]);
    seconds.push_back(slowest);
  }
  return {median(seconds), *std::min_element(seconds.begin(), seconds.end())};
}

void measure(const CollectivesOptions& o, const std::shared_ptr<distributed::World>& world) {
  const auto& environment = world->environment();
  const at::Device device = graft::choose_device(config::parse_choice<config::Device>("--device", o.device),
                                                 environment.local_rank, environment.local_world_size);
  const at::NoGradGuard no_grad;
  Json results = Json::array();
  std::vector<std::vector<std::string>> rows;
  for (const auto& text : o.sizes)
    for (const auto& c : make_collectives(parse_size(text), world->size(), world->rank(), device)) {
      if (!o.only.empty() && std::find(o.only.begin(), o.only.end(), c.name) == o.only.end()) continue;
      const auto [seconds, best] = time_collective(c, *world, o.rounds, device);
      results.push_back({{"op", c.name},
                         {"bytes", c.bytes},
                         {"ms", 1e3 * seconds},
                         {"best_ms", 1e3 * best},
                         {"algorithm_gb_per_s", c.bytes / seconds / 1e9},
                         {"bus_gb_per_s", c.on_links / seconds / 1e9}});
      rows.push_back({c.name, fixed(c.bytes / 1024, 0), fixed(1e3 * seconds, 3), fixed(1e3 * best, 3),
                      fixed(c.bytes / seconds / 1e9, 3), fixed(c.on_links / seconds / 1e9, 3)});
    }
  if (world->rank() != 0) return;
  const int64_t nodes = (world->size() + environment.local_world_size - 1) / environment.local_world_size;
  const std::string backend = device.is_cuda() ? "nccl" : "gloo";
  if (o.json) {
    std::cout << Json{{"tool", "moegraft"},
                      {"bench", "collectives"},
                      {"processes", world->size()},
                      {"nodes", nodes},
                      {"backend", backend},
                      {"device", device.str()},
                      {"threads", at::get_num_threads()},
                      {"launcher", environment.launcher},
                      {"rounds", o.rounds},
                      {"collectives", results}}
                     .dump()
              << '\n';
    return;
  }
  std::stable_sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a[0] < b[0]; });
  print_table({"collective", "KiB", "ms", "best ms", "GB/s of message", "GB/s on links"}, rows);
  std::printf("%lld processes on %lld machines, %s\n", static_cast<long long>(world->size()),
              static_cast<long long>(nodes), backend.c_str());
}

void run(const CollectivesOptions& o) {
  const std::vector<std::string> known{"all_reduce", "all_gather", "all_to_all", "all_to_all skewed", "broadcast"};
  for (const auto& name : o.only)
    MOEGRAFT_CHECK_USAGE(std::find(known.begin(), known.end(), name) != known.end(),
                         "--only: all_reduce, all_gather, all_to_all, 'all_to_all skewed' or broadcast, got ", name);
  for (const auto& text : o.sizes) parse_size(text);
  set_threads(o.threads);
  const auto joined = [](const std::vector<std::string>& list) {
    std::string text;
    for (const auto& item : list) text += item + ",";
    return text;
  };
  with_world(
      o.device,
      moegraft::detail::concat("collectives ", o.device, " ", joined(o.sizes), " ", joined(o.only), " ", o.rounds),
      [&](const auto& world) { measure(o, world); }, /*backend_for_one=*/true);
}

}  // namespace

void add_collectives_command(CLI::App& bench) {
  auto o = std::make_shared<CollectivesOptions>();
  CLI::App* cmd = bench.add_subcommand("collectives", "Time and bandwidth of the processes' exchanges by message size");
  cmd->add_option("--sizes", o->sizes, "Bytes of the messages: 65536, 64K, 16M, …")
      ->delimiter(',')
      ->capture_default_str();
  cmd->add_option("--only", o->only, "Some of: all_reduce all_gather all_to_all 'all_to_all skewed' broadcast")
      ->delimiter(',');
  cmd->add_option("--rounds", o->rounds, "Times each is measured; the median counts")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  cmd->add_option("--device", o->device, "cpu (Gloo) or cuda (NCCL)")->capture_default_str();
  cmd->add_option("--threads", o->threads, "CPU threads; 0: all")->check(CLI::Range(0, 4096));
  cmd->add_flag("--json", o->json, "One JSON object on stdout");
  cmd->footer(
      "Example: moegraft launch --nproc 2 -- bench collectives --sizes 64K,1M,16M\n"
      "With all_to_all skewed half of every process's rows go to the first one.");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools::bench
