#include "arguments.h"

#include <filesystem>
#include <set>
#include <vector>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/config/config.h"

namespace moegraft::tools {
namespace {

// Options and positionals that name files or folders, by their long name.
const std::set<std::string> kPaths = {
    "against", "annotations", "baselines", "candidates", "checkpoint", "codec",   "config",   "dense",     "eval-text",
    "file",    "font",        "handbook",  "ids",        "image",      "images",  "manifest", "measured",  "model",
    "out",     "output",      "path",      "prompts",    "ranking",    "resume",  "run",      "retrieval", "save",
    "sheet",   "synonyms",    "text",      "tokenizer",  "with-image", "wordnet", "x",        "y"};

bool is_path(const CLI::App& command, const std::string& name) {
  if (name == "text" && command.get_name() == "tokenize") return false;  // the text itself
  return kPaths.contains(name);
}

std::vector<std::string> names_of_commands(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(command->get_name());
  return names;
}

std::vector<std::string> names_of_options(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options())
    for (const auto& name : option->get_lnames()) names.push_back("--" + name);
  return names;
}

}  // namespace

void expand_paths(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    const std::string name = option->get_single_name();
    // The shell has had its say before: a file of just that name is what is meant.
    if (is_path(app, name))
      option->transform([name](const std::string& path) {
        std::error_code too_long;  // a list of ids is no name of a file
        return std::filesystem::exists(path, too_long) ? path : config::expand_path(path, name);
      });
  }
  for (CLI::App* command : app.get_subcommands([](CLI::App*) { return true; })) expand_paths(*command);
}

std::string unknown_word(const CLI::App& app) {
  std::string command = app.get_name();
  for (const CLI::App* at = &app;; at = at->get_subcommands().front()) {
    if (at != &app) command += " " + at->get_name();
    const auto commands = names_of_commands(*at);
    for (const std::string& word : at->remaining()) {
      if (word == "--") continue;  // what separates a launched command
      const bool option = word.starts_with("-");
      const std::string name = word.substr(0, option ? word.find('=') : std::string::npos);
      const std::string near = !option                  ? nearest_word(name, commands)
                               : name.starts_with("--") ? nearest_word(name, names_of_options(*at))
                                                        : "";
      if (near == name) continue;  // another command's
      const char* kind = option ? "option " : commands.empty() ? "argument " : "command ";
      const std::string known =
          !option && !commands.empty() ? "expected one of " + join(commands, ", ") : "see " + command + " --help";
      return "unknown " + (kind + name) + " of " + command + "; " +
             (near.empty() ? known : "did you mean " + near + "?");
    }
    if (at->get_subcommands().empty()) return "";
  }
}

std::string called_command(const CLI::App& app) {
  std::string name = app.get_name();
  for (const CLI::App* at = &app; !at->get_subcommands().empty();)
    name += " " + (at = at->get_subcommands().front())->get_name();
  return name;
}

std::string taken_argument(const CLI::App& app) {
  const CLI::App* at = &app;
  while (!at->get_subcommands().empty()) at = at->get_subcommands().front();
  for (const CLI::Option* missing : at->get_options()) {
    if (!missing->get_positional() || !missing->get_required() || missing->count() > 0) continue;
    for (const CLI::Option* option : at->get_options())
      if (option->get_allow_extra_args() && option->count() > 1)
        return missing->get_name() + " of " + at->get_name() + " is missing, and " + option->get_name() + " took " +
               join(option->results(), ", ") + "; give " + missing->get_name() + " first";
  }
  return "";
}

}  // namespace moegraft::tools
