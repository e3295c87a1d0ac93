#include "moegraft/io/mapped_files.h"

#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <mutex>

namespace moegraft::io {
namespace {

// Read by a signal handler: no locks, no allocation. A slot is taken while `base` is set, which is the last thing
// written and the first thing cleared.
struct Slot {
  std::atomic<const char*> base{nullptr};
  size_t bytes = 0;
  std::array<char, 512> path{};
};
std::array<Slot, 4096> slots;
std::mutex writers;

void say(const char* text) { [[maybe_unused]] const auto n = ::write(STDERR_FILENO, text, std::strlen(text)); }

void on_bus_error(int signal, siginfo_t* info, void*) {
  const char* at = static_cast<const char*>(info->si_addr);
  for (const Slot& slot : slots) {
    const char* base = slot.base.load(std::memory_order_acquire);
    if (base == nullptr || at < base || at >= base + slot.bytes) continue;
    say("error: ");
    say(slot.path.data());
    say(" was cut short or cannot be read any more while it is in use: put it back and start again\n");
    ::_exit(1);
  }
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

}  // namespace

void note_mapping(const void* base, size_t bytes, const std::string& path) {
  const std::lock_guard lock(writers);
  for (Slot& slot : slots) {
    if (slot.base.load(std::memory_order_relaxed) != nullptr) continue;
    slot.bytes = bytes;
    std::strncpy(slot.path.data(), path.c_str(), slot.path.size() - 1);
    slot.base.store(static_cast<const char*>(base), std::memory_order_release);
    return;
  }
}

void forget_mapping(const void* base) {
  const std::lock_guard lock(writers);
  for (Slot& slot : slots)
    if (slot.base.load(std::memory_order_relaxed) == base) slot.base.store(nullptr, std::memory_order_release);
}

void name_file_on_bus_error() {
  struct sigaction action{};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGBUS, &action, nullptr);
}

}  // namespace moegraft::io
