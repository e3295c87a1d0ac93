#include <c10/util/Exception.h>
#include <c10/util/Logging.h>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <new>
#include <optional>

#include "arguments.h"
#include "command.h"
#include "machine.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/base/wait_policy.h"
#include "moegraft/io/mapped_files.h"
#include "startup.h"

namespace {

// One line for whatever ends a command: LibTorch's errors carry their stack.
std::string describe(const std::exception& e) {
  if (dynamic_cast<const std::bad_alloc*>(&e))
    return "out of memory: use fewer tokens per step, a lower precision, or a machine with more";
  if (const auto* error = dynamic_cast<const c10::Error*>(&e)) {
    const std::string text = error->what_without_backtrace();
    const bool memory = text.find("alloc") != std::string::npos && text.find("memory") != std::string::npos;
    return (memory ? "out of memory: " : "") + moegraft::shortened(text, 400);
  }
  return e.what();
}

// Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 stopped by a signal with everything saved (train).
int run(int argc, char** argv) {
  using namespace moegraft;
  CLI::App app{"moegraft: graft a new modality onto a text-only Mixture-of-Experts LLM", "moegraft"};
  app.require_subcommand(1);
  app.set_version_flag("--version", MOEGRAFT_VERSION);
  bool verbose = false;
  std::optional<WaitPolicy> waits;
  app.add_flag("-v,--verbose", verbose, "Debug messages");
  tools::add_machine_options(app);
  app.parse_complete_callback([&] {
    if (verbose) log::set_level(log::Level::debug);
    tools::refuse_old_variables();
    if (app.got_subcommand("launch"))
      return tools::check_launched(app);  // what it starts inherits a policy, and makes its own
    if (!app.got_subcommand("train")) tools::choose_machine(app);  // train: when it has read its keys
    waits.emplace();
  });
  tools::add_train_command(app);
  tools::add_config_command(app);
  tools::add_generate_command(app);
  tools::add_eval_command(app);
  tools::add_export_command(app);
  tools::add_inspect_command(app);
  tools::add_logits_command(app);
  tools::add_tokenize_command(app);
  tools::add_import_command(app);
  tools::add_upcycle_command(app);
  tools::add_codec_command(app);
  tools::add_data_command(app);
  tools::add_ot_command(app);
  tools::add_bench_command(app);
  tools::add_summary_command(app);
  tools::add_launch_command(app);
  tools::expand_paths(app);
  try {
    tools::parse(app, argc, argv);
    return 0;
  } catch (const CLI::Success& e) { return app.exit(e); } catch (const CLI::RuntimeError& e) {
    return e.get_exit_code();  // a command that ended with a code of its own
  } catch (const CLI::ParseError& e) {
    if (const std::string unknown = tools::unknown_word(app); !unknown.empty())
      log::error(unknown);
    else if (const std::string taken = tools::taken_argument(app); !taken.empty())
      log::error(taken);
    else
      log::error(shortened(e.what(), 400), "; see ", tools::called_command(app), " --help");
    return 2;
  } catch (const UsageError& e) {
    log::error(e.what());
    return 2;
  } catch (const std::exception& e) {
    log::error(describe(e));
    return 1;
  }
}

// An exception in a thread that nobody waits for: one line as well.
[[noreturn]] void end_by_exception() {
  try {
    if (const auto current = std::current_exception()) std::rethrow_exception(current);
    moegraft::log::error("ended without an exception: this is a fault of the program");
  } catch (const std::exception& e) { moegraft::log::error(describe(e)); } catch (...) {
    moegraft::log::error("ended by an unknown exception: this is a fault of the program");
  }
  std::_Exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  std::set_terminate(end_by_exception);
  moegraft::io::name_file_on_bus_error();
  moegraft::tools::choose_policies(argv);
  c10::initLogging();  // TORCH_CPP_LOG_LEVEL
  moegraft::tools::keep_pages();
  return run(argc, argv);
}
