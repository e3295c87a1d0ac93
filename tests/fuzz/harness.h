#pragma once
// Runs a reader over mutated inputs for a bounded time: it may refuse an input with a UserError and nothing else,
// within seconds.

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "mutate.h"

namespace moegraft::fuzz {

class Scratch {
 public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "moegraft-fuzz-XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  ~Scratch() { std::filesystem::remove_all(path_); }
  std::filesystem::path write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
    return path_ / name;
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline std::string golden(const std::string& name) {
  std::ifstream in(std::filesystem::path(test_source_dir()) / "tests/golden" / name, std::ios::binary);
  EXPECT_TRUE(in.good()) << name;
  return {std::istreambuf_iterator<char>(in), {}};
}

struct Target {
  const char* name;
  std::vector<std::string> seeds;
};

inline void run(const Target& target, const std::function<void(const Scratch&, const std::string&)>& read) {
  using Clock = std::chrono::steady_clock;
  const char *given = std::getenv("MOEGRAFT_FUZZ_SECONDS"), *seed = std::getenv("MOEGRAFT_FUZZ_SEED");
  const double seconds = given ? std::atof(given) : 2;
  constexpr double kMostSeconds = 15;  // of one input, sanitized and beside other work
  log::set_level(log::Level::error);
  const Scratch dir;
  for (const auto& good : target.seeds) ASSERT_NO_THROW(read(dir, good)) << target.name << ": a seed must read";
  int64_t inputs = 0, refused = 0;
  for (const auto begin = Clock::now(); std::chrono::duration<double>(Clock::now() - begin).count() < seconds;
       ++inputs) {
    Rng rng(seed ? std::strtoull(seed, nullptr, 10) : 17, target.name, uint64_t(inputs));
    const std::string text = mutate(target.seeds, rng);
    const auto start = Clock::now();
    std::string trouble;
    try {
      read(dir, text);
    } catch (const UserError&) { ++refused; } catch (const std::exception& e) {
      trouble = std::string("not a UserError: ") + e.what();
    }
    const double took = std::chrono::duration<double>(Clock::now() - start).count();
    if (took > kMostSeconds) trouble = "took " + std::to_string(took) + " s";
    if (trouble.empty()) continue;
    const auto kept = std::filesystem::temp_directory_path() /
                      ("moegraft-fuzz-" + std::string(target.name) + "-" + std::to_string(inputs));
    std::ofstream(kept, std::ios::binary) << text;
    ADD_FAILURE() << target.name << ", input " << inputs << " (kept in " << kept << "): " << trouble;
    break;
  }
  log::set_level(log::Level::info);
  std::printf("%s: %lld inputs, %lld refused\n", target.name, static_cast<long long>(inputs),
              static_cast<long long>(refused));
}

}  // namespace moegraft::fuzz
