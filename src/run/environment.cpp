#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/version.h>

#include <fstream>

#include "moegraft/base/text.h"
#include "moegraft/io/files.h"
#include "moegraft/kernels/cpu.h"
#include "moegraft/kernels/device_numerics.h"
#include "moegraft/run/run_dir.h"

namespace moegraft::run {
namespace {

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("model name")) return trim(line.substr(line.find(':') + 1));
  return "unknown";
}

std::string checksum_of_executable() {
  try {
    char text[17];
    snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(io::checksum_file("/proc/self/exe")));
    return text;
  } catch (const std::exception&) { return "unknown"; }
}

}  // namespace

std::map<std::string, std::string> describe_environment(const std::string& device) {
  static const std::string binary = checksum_of_executable();  // all of a large file: read once
  std::map<std::string, std::string> out{{"binary", binary},
                                         {"libtorch", TORCH_VERSION},
                                         {"processor", processor_name()},
                                         {"instructions", at::get_cpu_capability()},
                                         {"cpu_path", kernels::cpu_kernels().path},
                                         {"threads", std::to_string(at::get_num_threads())},
                                         {"device", device}};
  const std::string attention = kernels::describe_device_attention();
  if (device.starts_with("cuda"))
    out["attention"] = attention.substr(0, attention.find(' '));  // the kernel, without the reason
  return out;
}

}  // namespace moegraft::run
