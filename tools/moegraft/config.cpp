// moegraft config: the keys of the YAML files. docs/config.md is what it prints.
#include "moegraft/config/config.h"

#include <algorithm>
#include <iostream>
#include <memory>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/codec/train.h"
#include "moegraft/evaluate/config.h"
#include "moegraft/run/run_config.h"

namespace moegraft::tools {
namespace {

// Every YAML file that a command reads.
struct File {
  const char *name, *read_by;
  std::vector<config::Key> (*keys)();
};
constexpr File kFiles[] = {
    {"train", "moegraft train -c run.yaml", config::describe<run::RunConfig>},
    {"eval", "moegraft eval RUN -c eval.yaml", config::describe<evaluate::EvalConfig>},
    {"codec", "moegraft codec train -c codec.yaml", config::describe<codec::CodecRunConfig>},
};

constexpr const char* kIntroduction =
    "# Keys of the YAML files\n\n"
    "`moegraft config` prints this page; `moegraft config train --format yaml` prints a file to start from, with every "
    "key at its default. Any key can be given\n"
    "on the command line: `--set train.steps=200 --set 'adapters[0].rank=8'`. An unknown key is an error that names "
    "the nearest known one.\n"
    "In a path, `[]` is each item of a list and `<name>` the name of a mapping's entry. [How values are "
    "read](../src/config/README.md).\n";

struct Options {
  std::vector<std::string> files;
  std::string format = "markdown";
};

void print(const Options& o) {
  std::vector<File> wanted;
  for (const File& file : kFiles)
    if (o.files.empty() || std::find(o.files.begin(), o.files.end(), file.name) != o.files.end())
      wanted.push_back(file);
  if (o.format == "yaml") {
    MOEGRAFT_CHECK_USAGE(wanted.size() == 1,
                         "--format yaml makes one file: say which, as in moegraft config train --format yaml");
    std::cout << "# For " << wanted[0].read_by << "\n\n" << config::to_yaml(wanted[0].keys());
    return;
  }
  if (o.files.empty()) std::cout << kIntroduction << "\n";
  for (size_t i = 0; i < wanted.size(); ++i)
    std::cout << (i ? "\n" : "") << "## " << wanted[i].name << ": `" << wanted[i].read_by << "`\n\n"
              << config::to_markdown(wanted[i].keys());
}

}  // namespace

void add_config_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  std::vector<std::string> names;
  for (const File& file : kFiles) names.push_back(file.name);
  CLI::App* cmd = app.add_subcommand("config", "Every key of the YAML files: type, range, default, meaning");
  cmd->add_option("command", o->files, "Whose file; without one: all")->check(CLI::IsMember(names));
  cmd->add_option("--format", o->format, "markdown: tables to read; yaml: a file to start from")
      ->check(CLI::IsMember({"markdown", "yaml"}))
      ->capture_default_str();
  cmd->footer("Examples:\n  moegraft config eval\n  moegraft config train --format yaml > run.yaml");
  cmd->callback([o] { print(*o); });
}

}  // namespace moegraft::tools
