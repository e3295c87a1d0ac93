// Every collective against its closed form, with 2 and 4 processes on loopback, and in a group of one.
#include <gtest/gtest.h>

#include "libtorch.h"
#include "moegraft/distributed/world.h"
#include "support/ranks/ranks.h"

namespace moegraft::distributed {
namespace {

using moegraft::testing::run_ranks;

std::shared_ptr<World> join(std::chrono::milliseconds timeout = std::chrono::seconds(20)) {
  at::set_num_threads(1);
  return World::join(read_launch_environment(), {.timeout = timeout});
}

at::Tensor ramp(int64_t n, at::ScalarType dtype) { return at::remainder(at::arange(n, at::kLong), 16).to(dtype); }

// Small whole numbers are exact in every dtype: rank r gives r + 1 times a ramp.
RANK_BODY(reductions) {
  auto world = join();
  auto& all = world->all();
  const int64_t n = all.size(), total = n * (n + 1) / 2;
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kLong, at::kInt}) {
    for (const int64_t numel : {0, 1, 2, 3, 7, 64, 1001, 65537}) {
      at::Tensor t = ramp(numel, dtype) * (all.rank() + 1);
      all.all_reduce(t, "a ramp").wait();
      EXPECT_TRUE(at::equal(t, ramp(numel, dtype) * total)) << dtype << ' ' << numel;
      at::Tensor least = ramp(numel, dtype) + (all.rank() == n - 1 ? 0 : all.rank() + 3);
      all.all_reduce_min(least, "a ramp").wait();
      EXPECT_TRUE(at::equal(least, ramp(numel, dtype))) << dtype << ' ' << numel;
    }
  }
  at::Tensor scalar = at::full({}, 2.5, at::kDouble);
  all.all_reduce(scalar, "a scalar").wait();
  EXPECT_EQ(scalar.item<double>(), 2.5 * static_cast<double>(n));
}

RANK_BODY(copies) {
  auto world = join();
  auto& all = world->all();
  const int64_t n = all.size(), me = all.rank();
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kLong, at::kByte, at::kBool}) {
    for (const int64_t rows : {0, 1, 5, 333}) {
      for (int64_t root = 0; root < n; ++root) {
        at::Tensor t = at::full({rows, 3}, me + 1, at::kLong).to(dtype);
        all.broadcast(t, root, "rows").wait();
        EXPECT_TRUE(at::equal(t, at::full({rows, 3}, root + 1, at::kLong).to(dtype)));
      }
      at::Tensor in = (at::arange(rows * 3).view({rows, 3}) % 7 + me).to(dtype),
                 out = at::empty({n * rows, 3}, in.options());
      all.all_gather(out, in, "rows").wait();
      std::vector<at::Tensor> expected;
      for (int64_t r = 0; r < n; ++r) expected.push_back((at::arange(rows * 3).view({rows, 3}) % 7 + r).to(dtype));
      EXPECT_TRUE(at::equal(out, at::cat(expected)));
    }
  }
  const auto texts =
      all.all_gather_text(std::string(static_cast<size_t>(me) * 3, static_cast<char>('a' + me)), "names");
  ASSERT_EQ(static_cast<int64_t>(texts.size()), n);
  for (int64_t r = 0; r < n; ++r)
    EXPECT_EQ(texts[static_cast<size_t>(r)], std::string(static_cast<size_t>(r) * 3, static_cast<char>('a' + r)));
  all.barrier("the end");
}

// Rank s sends count(s, d) rows of value 100 s + d to rank d.
void exchange(Communicator& group, at::ScalarType dtype, const std::vector<int64_t>& row_shape,
              const std::function<int64_t(int64_t, int64_t)>& count) {
  const int64_t n = group.size(), me = group.rank();
  std::vector<int64_t> in_rows, out_rows;
  std::vector<at::Tensor> in, expected;
  const auto rows = [&](int64_t s, int64_t d) {
    std::vector<int64_t> shape = {count(s, d)};
    shape.insert(shape.end(), row_shape.begin(), row_shape.end());
    return at::full(shape, s * 16 + d, at::kLong).to(dtype);
  };
  for (int64_t r = 0; r < n; ++r) {
    in_rows.push_back(count(me, r)), in.push_back(rows(me, r));
    out_rows.push_back(count(r, me)), expected.push_back(rows(r, me));
  }
  const at::Tensor want = at::cat(expected);
  at::Tensor got = at::empty_like(want);
  group.all_to_all(got, at::cat(in).contiguous(), out_rows, in_rows, "rows").wait();
  EXPECT_TRUE(at::equal(got, want)) << dtype;
}

RANK_BODY(exchanges) {
  auto world = join();
  auto& all = world->all();
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kLong, at::kInt, at::kByte}) {
    exchange(all, dtype, {3}, [](int64_t, int64_t) { return 2; });
    exchange(all, dtype, {}, [](int64_t s, int64_t d) { return s * 3 + d; });  // uneven, row 0 -> 0 empty
    exchange(all, dtype, {5, 2},
             [](int64_t s, int64_t d) { return d == 1 ? 7 + s : 0; });  // all to one: the others receive nothing
    exchange(all, dtype, {4}, [](int64_t s, int64_t) { return s == 0 ? 9 : 0; });  // only one sends
    exchange(all, dtype, {4}, [](int64_t, int64_t) { return 0; });                 // nobody sends
    exchange(all, dtype, {0}, [](int64_t s, int64_t d) { return s + d; });         // rows without bytes
    exchange(all, dtype, {65}, [](int64_t s, int64_t d) { return (s * 31 + d * 17) % 101 * 11; });
  }
}

RANK_BODY(sums_repeat) {
  auto world = join();
  auto& all = world->all();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t numel : {5, 1023, 40961}) {
      auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(numel * 10 + all.rank()));
      const at::Tensor mine = at::randn({numel}, generator, at::kFloat).to(dtype);
      at::Tensor first;
      for (int round = 0; round < 20; ++round) {
        at::Tensor t = mine.clone();
        all.all_reduce(t, "noise").wait();
        if (round == 0) {
          first = t;
          at::Tensor everybody = at::empty({all.size(), numel}, t.options());
          all.all_gather(everybody, t, "sums").wait();
          for (int64_t r = 0; r < all.size(); ++r)
            EXPECT_TRUE(at::equal(everybody[r], t)) << "rank " << r << " has other bits";
        }
        EXPECT_TRUE(at::equal(t, first)) << dtype << ' ' << numel << " round " << round;
      }
    }
  }
}

// Several under way at once, waited for in another order.
RANK_BODY(overlap) {
  auto world = join();
  auto& all = world->all();
  const int64_t n = all.size();
  std::vector<at::Tensor> sums;
  std::vector<Pending> pending;
  for (int64_t i = 0; i < 20; ++i) {
    sums.push_back(at::full({i * 100 + 1}, static_cast<double>(i + all.rank()), at::kFloat));
    pending.push_back(all.all_reduce(sums.back(), "bucket " + std::to_string(i)));
  }
  for (size_t i = 20; i-- > 0;) {
    pending[i].wait();
    EXPECT_EQ(sums[i][0].item<double>(), static_cast<double>(static_cast<int64_t>(i) * n + n * (n - 1) / 2));
  }
  at::Tensor dropped = at::ones({10});
  { auto waits = all.all_reduce(dropped, "dropped"); }
  EXPECT_EQ(dropped[9].item<double>(), static_cast<double>(n));
  const auto traffic = all.take_traffic();
  EXPECT_EQ(traffic.calls, 21);
  EXPECT_EQ(traffic.bytes, 4 * (19 * 20 / 2 * 100 + 20 + 10));
  EXPECT_GT(traffic.wait_seconds, 0);
  EXPECT_EQ(all.take_traffic().calls, 0);
}

RANK_BODY(meshes) {
  auto world = join();
  const int64_t me = world->rank(), n = world->size();
  for (int64_t expert = 1; expert <= n; expert *= 2) {
    const Mesh mesh = make_mesh(world, expert);
    EXPECT_EQ(mesh.expert->rank(), me % expert);
    EXPECT_EQ(mesh.data->rank(), me / expert);
    EXPECT_EQ(mesh.expert_size() * mesh.data_size(), n);
    at::Tensor sum = at::full({3}, static_cast<double>(me), at::kDouble);
    at::Tensor other = sum.clone();
    mesh.expert->all_reduce(sum, "ranks").wait();
    mesh.data->all_reduce(other, "ranks").wait();
    double in_expert = 0, in_data = 0;
    for (int64_t r = 0; r < n; ++r)
      in_expert += r / expert == me / expert ? double(r) : 0, in_data += r % expert == me % expert ? double(r) : 0;
    EXPECT_EQ(sum[2].item<double>(), in_expert);
    EXPECT_EQ(other[2].item<double>(), in_data);
  }
  EXPECT_THROW(make_mesh(world, 3), std::exception);
}

RANK_BODY(notes) {
  auto world = join();
  EXPECT_FALSE(world->look("nothing"));
  world->post("from/" + std::to_string(world->rank()), std::string("a\0b", 3));
  world->all().barrier("posted");
  for (int64_t r = 0; r < world->size(); ++r)
    EXPECT_EQ(world->look("from/" + std::to_string(r)), std::string("a\0b", 3));
}

TEST(Collectives, Reductions) {
  for (const int n : {2, 4}) run_ranks("reductions", n);
}
TEST(Collectives, Copies) {
  for (const int n : {2, 4}) run_ranks("copies", n);
}
TEST(Collectives, Exchanges) {
  for (const int n : {2, 4}) run_ranks("exchanges", n);
}
TEST(Collectives, SumsHaveTheSameBitsEveryTime) {
  for (const int n : {2, 4}) run_ranks("sums_repeat", n);
}
TEST(Collectives, Overlap) { run_ranks("overlap", 4); }
TEST(Collectives, Meshes) { run_ranks("meshes", 4); }
TEST(Collectives, Notes) { run_ranks("notes", 2); }

TEST(Collectives, GroupOfOneCopies) {
  auto world = World::join({});
  auto& all = world->all();
  at::Tensor t = at::arange(5), out = at::empty({5}, at::kLong);
  all.all_reduce(t, "t").wait();
  all.broadcast(t, 0, "t").wait();
  EXPECT_TRUE(at::equal(t, at::arange(5)));
  all.all_gather(out, t, "t").wait();
  EXPECT_TRUE(at::equal(out, t));
  out.zero_();
  all.all_to_all(out, t, {5}, {5}, "t").wait();
  EXPECT_TRUE(at::equal(out, t));
  EXPECT_EQ(all.all_gather_text("x", "t"), std::vector<std::string>{"x"});
  all.barrier("t");
  world->agree({{"config", "a"}});
  world->beat(3);
  world->post("k", "v");
  EXPECT_EQ(world->look("k"), "v");
  EXPECT_FALSE(world->look("other"));
  EXPECT_EQ(make_mesh(world, 1).data_size(), 1);
}

// The same calls on a real backend of one process.
TEST(Collectives, GroupOfOneOnItsBackend) {
  auto world = World::join({}, {.backend_for_one = true});
  auto& all = world->all();
  at::Tensor t = ramp(77, at::kFloat), out = at::empty({77});
  all.all_reduce(t, "t").wait();
  EXPECT_TRUE(at::equal(t, ramp(77, at::kFloat)));
  all.all_gather(out, t, "t").wait();
  EXPECT_TRUE(at::equal(out, t));
  exchange(all, at::kBFloat16, {3}, [](int64_t, int64_t) { return 4; });
  exchange(all, at::kBFloat16, {3}, [](int64_t, int64_t) { return 0; });
  EXPECT_EQ(all.all_gather_text("x", "t"), std::vector<std::string>{"x"});
  EXPECT_GE(all.take_traffic().calls, 5);
}

}  // namespace
}  // namespace moegraft::distributed
