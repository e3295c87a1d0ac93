// What -o may replace.
#include <algorithm>
#include <filesystem>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::tools {

void check_tensor_output(const std::string& file, const std::vector<std::string>& tensors) {
  if (file.empty() || !std::filesystem::exists(file)) return;
  bool ours = false;
  try {
    const io::SafetensorsFile there(file);
    const auto names = there.names();
    ours = there.contains(tensors.front()) && std::all_of(names.begin(), names.end(), [&](const auto& name) {
             return std::find(tensors.begin(), tensors.end(), name) != tensors.end();
           });
  } catch (const UserError&) {}
  MOEGRAFT_CHECK_USAGE(ours, "-o: ", file, " exists and holds no ", tensors.front(),
                       "; give another file or remove it");
}

}  // namespace moegraft::tools
