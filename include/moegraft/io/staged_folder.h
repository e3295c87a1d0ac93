#pragma once
// A folder that is written beside its final place and appears there whole, or not at all.

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace moegraft::io {

class StagedFolder {
 public:
  // Makes ".NAME.part-PID" beside `target` (of a link: beside what it names), and the folders above it; removes such
  // folders of processes that were killed. UserError when it cannot; UsageError when the current directory is `target`
  // or lies in it.
  explicit StagedFolder(std::filesystem::path target);
  ~StagedFolder();  // without publish(): removes what was written
  StagedFolder(const StagedFolder&) = delete;
  StagedFolder& operator=(const StagedFolder&) = delete;

  const std::filesystem::path& path() const { return staged_; }
  const std::filesystem::path& target() const { return target_; }
  // Puts the folder in its place, where there must be nothing, or an empty folder. Else `check_replace` is asked, which
  // throws when what is there by now may not be replaced; then it is exchanged and removed. Without one nothing is
  // replaced. UserError: the old one stays.
  void publish(const std::function<void()>& check_replace = {});

 private:
  std::filesystem::path target_, staged_;
  int lock_ = -1;
};

// The name of something in `folder` that is none of `ours`: what must not go with an old folder. Empty: there is
// nothing else.
std::string find_foreign(const std::filesystem::path& folder, const std::vector<std::string>& ours);

}  // namespace moegraft::io
