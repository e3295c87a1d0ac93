#include "rendezvous.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "store_guard.h"

namespace moegraft::distributed {
namespace {

using namespace std::chrono_literals;

double seconds(std::chrono::milliseconds t) { return static_cast<double>(t.count()) / 1000; }

bool accepts(const std::string& host, int64_t port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return false;
  bool open = false;
  for (const addrinfo* at = found; at && !open; at = at->ai_next) {
    const int fd = socket(at->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    int error = 0;
    socklen_t length = sizeof error;
    if (connect(fd, at->ai_addr, at->ai_addrlen) == 0) {
      open = true;
    } else if (errno == EINPROGRESS) {
      pollfd wait{fd, POLLOUT, 0};
      open = poll(&wait, 1, 2000) == 1 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0;
    }
    close(fd);
  }
  freeaddrinfo(found);
  return open;
}

// A socket that listens on the loopback device alone; -1: let the store listen as it likes.
int loopback_socket(int64_t port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  if (bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 && listen(fd, SOMAXCONN) == 0) return fd;
  const int reason = errno;
  close(fd);
  fail<UserError>("rank 0: cannot listen at 127.0.0.1:", port, " (", std::strerror(reason),
                  "): set another MASTER_PORT");
}

constexpr auto kSayEvery = 10s;  // who is waited for

c10::intrusive_ptr<c10d::Store> connect_store(const LaunchEnvironment& e, std::chrono::milliseconds timeout,
                                              Clock::time_point deadline) {
  const std::string place = detail::concat(e.master_address, ':', e.master_port);
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(e.master_port);
  options.isServer = e.rank == 0 && !e.agent_store;
  options.waitWorkers = false;
  options.timeout = timeout;
  // Where nobody else has to reach it, nobody else can.
  if (options.isServer && e.local_world_size == e.world_size && is_loopback(e.master_address))
    options.masterListenFd = loopback_socket(e.master_port);
  // The store's own client would log a stack for every failed attempt.
  for (auto pause = 10ms; !options.isServer && !accepts(e.master_address, e.master_port);
       pause = std::min(pause * 2, 500ms)) {
    MOEGRAFT_CHECK(
        Clock::now() < deadline, "rank ", e.rank, ": nobody answers at ", place, " after ", seconds(timeout), " s: ",
        e.agent_store ? "the launcher's agent should; start all ranks by one launcher"
                      : "rank 0 should; check that it has started, MASTER_ADDR and MASTER_PORT, and firewalls");
    std::this_thread::sleep_for(pause);
  }
  try {
    return c10::make_intrusive<c10d::TCPStore>(options.masterListenFd ? "127.0.0.1" : e.master_address, options);
  } catch (const std::exception& error) {
    const std::string what = error.what();
    if (options.isServer)
      fail<UserError>("rank 0: cannot serve the store at ", place, " (", what.substr(0, what.find('\n')),
                      "): set another MASTER_PORT");
    fail<UserError>("rank ", e.rank, ": the store at ", place, " does not answer (", what.substr(0, what.find('\n')),
                    ")");
  }
}

// Polls with growing pauses until done() or the deadline.
template <class Done>
bool poll_until(Clock::time_point deadline, const Done& done) {
  for (auto pause = 1ms;; pause = std::min(pause * 2, 50ms)) {
    if (done()) return true;
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(pause);
  }
}

// A server may outlive a start of the run (torchrun's agent keeps one through restarts), so that keys of dead processes
// are still in it, and restart counts may differ between nodes. So rank 0 names the session, and tells it only to
// processes whose fresh random id it has seen.
std::string agree_on_session(const Shared& shared, c10d::Store& store, Clock::time_point deadline) {
  const auto look = [&](const std::string& key) -> std::optional<std::string> {
    if (!store.check({key})) return {};
    return store.get_to_str(key);
  };
  const int64_t rank = shared.environment.rank, size = shared.environment.world_size;
  const auto missing_line = [&](const std::string& session) {
    std::vector<int64_t> missing;
    for (int64_t r = 1; r < size; ++r) {
      if (r != rank && !store.check({session + "/ready/" + std::to_string(r)})) missing.push_back(r);
    }
    return detail::concat(name_ranks(missing), " of ", size, " did not come within ", seconds(shared.timeout), " s");
  };
  if (rank == 0) {
    const std::string session = random_token();
    std::vector<std::string> greeted(static_cast<size_t>(size));
    std::vector<bool> ready(static_cast<size_t>(size));
    int64_t count = 1;
    const auto begin = Clock::now();
    auto say_at = begin + kSayEvery;
    const bool all = poll_until(deadline, [&] {
      for (int64_t r = 1; r < size; ++r) {
        const auto i = static_cast<size_t>(r);
        const std::string id = std::to_string(r);
        if (ready[i]) continue;
        const auto hello = look("hello/" + id);
        if (hello && *hello != greeted[i]) {
          store.set("welcome/" + *hello, session);
          greeted[i] = *hello;
        }
        if (store.check({session + "/ready/" + id})) ready[i] = true, ++count;
      }
      if (count < size && Clock::now() > say_at) {
        std::vector<int64_t> missing;
        for (int64_t r = 1; r < size; ++r)
          if (!ready[static_cast<size_t>(r)]) missing.push_back(r);
        log::info("waiting for ", name_ranks(missing), " of ", size, ", ",
                  std::chrono::duration_cast<std::chrono::seconds>(Clock::now() - begin).count(), " s of ",
                  seconds(shared.timeout));
        say_at = Clock::now() + kSayEvery;
      }
      return count == size;
    });
    if (!all) {
      const std::string line = missing_line(session);
      store.set(session + "/abort", line);
      std::this_thread::sleep_for(500ms);  // the server ends with this process: let the others read it
      fail<UserError>("rank 0: ", line);
    }
    store.set(session + "/all", "1");
    return session;
  }
  const std::string nonce = random_token();
  store.set("hello/" + std::to_string(rank), nonce);
  std::optional<std::string> session;
  // Rank 0 speaks first where both came at the same time.
  const auto patience = deadline + std::min(shared.timeout / 4, std::chrono::milliseconds(10'000));
  MOEGRAFT_CHECK(poll_until(patience, [&] { return (session = look("welcome/" + nonce)).has_value(); }), "rank ", rank,
                 ": rank 0 of ", size, " did not come within ", seconds(shared.timeout), " s");
  store.set(*session + "/ready/" + std::to_string(rank), "1");
  std::optional<std::string> abort;
  const bool all = poll_until(
      patience, [&] { return store.check({*session + "/all"}) || (abort = look(*session + "/abort")).has_value(); });
  MOEGRAFT_CHECK(all && !abort, "rank ", rank, ": ", abort ? *abort : missing_line(*session));
  return *session;
}

}  // namespace

bool is_loopback(const std::string& host) { return host.starts_with("127.") || host == "::1" || host == "localhost"; }

void meet(Shared& shared) {
  if (!shared.environment.distributed()) {
    shared.store = shared.backend_store = c10::make_intrusive<c10d::HashStore>();
    return;
  }
  const auto deadline = Clock::now() + shared.timeout;
  std::optional<StoreGuard::Call> call;
  if (shared.guard) call.emplace(*shared.guard, shared.timeout + shared.patience());
  auto server = connect_store(shared.environment, shared.timeout, deadline);
  // Without the token nobody finds the keys of this run: see docs/cluster.md for what that does and does not protect.
  if (!shared.environment.token.empty())
    server = c10::make_intrusive<c10d::PrefixStore>(shared.environment.token, server);
  std::string session;
  try {
    session = agree_on_session(shared, *server, deadline);
    shared.store = c10::make_intrusive<c10d::PrefixStore>(session, server);
    shared.backend_store = c10::make_intrusive<c10d::PrefixStore>(session + "/groups", server->clone());
  } catch (const c10::Error&) {
    fail<UserError>("rank ", shared.environment.rank, ": the store at ", shared.environment.master_address, ':',
                    shared.environment.master_port, " was closed during the rendezvous: see rank 0's error");
  }
}

std::vector<std::string> collect(const Shared& shared, const std::string& prefix, const std::string& mine,
                                 const std::string& purpose) {
  const int64_t rank = shared.environment.rank, size = shared.environment.world_size;
  std::vector<std::string> values(static_cast<size_t>(size));
  std::vector<int64_t> missing;
  for (int64_t r = 0; r < size; ++r) {
    if (r != rank) missing.push_back(r);
  }
  values[static_cast<size_t>(rank)] = mine;
  shared.post(prefix + std::to_string(rank), mine);
  poll_until(Clock::now() + shared.timeout, [&] {
    std::erase_if(missing, [&](int64_t r) {
      auto value = shared.look(prefix + std::to_string(r));
      if (value) values[static_cast<size_t>(r)] = std::move(*value);
      return value.has_value();
    });
    return missing.empty();
  });
  MOEGRAFT_CHECK(missing.empty(), "rank ", rank, ": ", purpose, ": ", name_ranks(missing), " did not answer within ",
                 seconds(shared.timeout), " s");
  return values;
}

}  // namespace moegraft::distributed
