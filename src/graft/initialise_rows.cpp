#include "moegraft/graft/initialise_rows.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "moegraft/ot/kmeans.h"

namespace moegraft::graft {
namespace {

constexpr int64_t kMomentRows = 16384;    // text rows behind the sampled moments
constexpr int64_t kClusterRestarts = 3;   // k-means and GW from this many seeds; the best objective wins
constexpr double kCollapsedSpread = 0.3;  // raw rms deviation, as a share of the text rows'
constexpr double kCollapsedCosine = 0.9;

at::Tensor longs(const std::vector<int64_t>& v) { return at::tensor(v, at::kLong); }

at::Tensor normal(at::IntArrayRef shape, uint64_t seed, const char* purpose) {
  return at::randn(shape, at::detail::createCPUGenerator(Rng(seed, purpose).derive_seed()),
                   at::TensorOptions(at::kDouble));
}

// The text side; head aliases embedding when tied.
struct Text {
  at::Tensor embedding_VD, head_VD;  // float64, CPU
  bool tied = false;
};

// The code rows before their mean and scale are matched.
struct CodeRows {
  at::Tensor embedding_ND, head_ND;
};

// What an initialisation reads, and where it notes what it found.
struct RowsContext {
  const Text& text;
  const at::Tensor& codebook_NZ;
  const CodeRows& drawn;  // moment_match's rows: the special ones, and last the codes' where they are drawn with them
  const ot::OtConfig& ot;
  uint64_t seed;
  RowsReport& report;
};

at::Tensor checked_matrix(const at::Tensor& x, const char* name) {
  MOEGRAFT_CHECK(x.defined() && x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0, "row initialisation: ", name,
                 " must be a matrix with rows, got ", x.defined() ? x.sizes().vec() : std::vector<int64_t>{});
  const at::Tensor d = x.detach().to(at::kCPU, at::kDouble).contiguous();
  MOEGRAFT_CHECK(d.isfinite().all().item<bool>(), "row initialisation: ", name, " holds NaN or Inf");
  return d;
}

double rms_deviation(const at::Tensor& x_ND) {
  return std::sqrt((x_ND - x_ND.mean(0)).square().sum(1).mean().item<double>());
}

// Same mean and root mean square deviation as the text rows: relative distances stay.
at::Tensor match_mean_and_scale(const at::Tensor& rows_ND, const at::Tensor& text_VD) {
  const double own = rms_deviation(rows_ND);
  return (rows_ND - rows_ND.mean(0)) * (own > 0 ? rms_deviation(text_VD) / own : 0.0) + text_VD.mean(0);
}

// Random combinations of centred text rows have the text rows' covariance exactly in expectation, jointly over
// embedding and head, and need no factorisation.
CodeRows moment_rows(const Text& text, int64_t count, uint64_t seed) {
  at::Tensor e = text.embedding_VD, h = text.head_VD;
  if (e.size(0) > kMomentRows) {
    auto order = Rng(seed, "graft.rows.moment_subset").permutation(e.size(0));
    order.resize(kMomentRows);
    e = e.index_select(0, longs(order));
    h = h.index_select(0, longs(order));
  }
  const at::Tensor mix_NV = normal({count, e.size(0)}, seed, "graft.rows.moment_match") / std::sqrt(double(e.size(0)));
  const auto draw = [&](const at::Tensor& x, const at::Tensor& all) {
    return at::mm(mix_NV, x - x.mean(0)) + all.mean(0);
  };
  return {draw(e, text.embedding_VD), text.tied ? at::Tensor() : draw(h, text.head_VD)};
}

CodeRows gather_rows(const Text& text, const std::vector<int64_t>& ids) {
  return {text.embedding_VD.index_select(0, longs(ids)),
          text.tied ? at::Tensor() : text.head_VD.index_select(0, longs(ids))};
}

// A cloud at a size the solver can take: all points, or the members nearest to k-means centres, weighted by their
// clusters.
struct Cloud {
  at::Tensor points, weights;   // [n,d] and [n]
  std::vector<int64_t> member;  // row of the full cloud behind each point
  at::Tensor owner;  // [N]: point that stands for each row of the full cloud; undefined when all points are kept
};

Cloud reduce(const at::Tensor& x_ND, int64_t limit, uint64_t seed) {
  const int64_t n = x_ND.size(0);
  Cloud cloud;
  if (n <= limit) {
    cloud.points = x_ND;
    cloud.weights = at::full({n}, 1.0 / double(n), at::kDouble);
    cloud.member.resize(n);
    std::iota(cloud.member.begin(), cloud.member.end(), int64_t{0});
    return cloud;
  }
  const ot::KMeansResult k = ot::kmeans(x_ND.to(at::kFloat), limit,
                                        {.restarts = 1, .max_iterations = 10, .max_samples = 16 * limit, .seed = seed});
  // Means of rows are shorter than rows and would collapse what is made of them: keep the member nearest to each
  // centre.
  const at::Tensor distance = (x_ND - k.centres_KD.to(at::kDouble).index_select(0, k.assignment_N)).square().sum(1);
  const int64_t* own = k.assignment_N.const_data_ptr<int64_t>();
  const double* d = distance.const_data_ptr<double>();
  cloud.member.assign(limit, -1);
  for (int64_t i = 0; i < n; ++i) {
    int64_t& best = cloud.member[own[i]];
    if (best < 0 || d[i] < d[best]) best = i;
  }
  cloud.points = x_ND.index_select(0, longs(cloud.member));
  cloud.weights = k.counts_K.to(at::kDouble) / double(n);
  cloud.owner = k.assignment_N;
  return cloud;
}

void note_plan(RowsReport& report, const ot::Result& plan) {
  report.points_x = plan.plan_NM.size(0);
  report.points_y = plan.plan_NM.size(1);
  report.objective = plan.objective;
  report.row_perplexity = plan.row_perplexity;
  const at::Tensor q = plan.plan_NM.sum(0);
  report.uniform_perplexity = std::exp(-at::special_xlogy(q, q).sum().item<double>());
  report.converged = plan.converged;
  report.reason = plan.reason;
  report.stages = plan.stages;
}

// The orthonormal map closest to the coupling's cross-covariance: d_z x D, rows orthonormal when d_z <= D.
at::Tensor polar_map(const at::Tensor& plan_NM, const at::Tensor& z_NZ, const at::Tensor& text_MD) {
  const at::Tensor p = plan_NM.sum(1), q = plan_NM.sum(0);
  const at::Tensor z = z_NZ - at::mv(z_NZ.t(), p), t = text_MD - at::mv(text_MD.t(), q);
  const auto [u, s, vh] = at::linalg_svd(at::mm(z.t(), at::mm(plan_NM, t)), /*full_matrices=*/false);
  return at::mm(u, vh);
}

ot::Result couple(const Cloud& codes, const Cloud& rows, const ot::OtConfig& ot) {
  return ot::solve(ot::Cost::squared_euclidean(codes.points), ot::Cost::squared_euclidean(rows.points),
                   solver_settings(ot, codes.points.size(0), rows.points.size(0)), codes.weights, rows.weights);
}

CodeRows barycentric_rows(const RowsContext& in) {
  const Cloud codes = reduce(in.codebook_NZ, in.ot.max_points, in.seed),
              rows = reduce(in.text.embedding_VD, in.ot.max_points, in.seed + 1);
  const ot::Result plan = couple(codes, rows, in.ot);
  note_plan(in.report, plan);
  const auto place = [&](const at::Tensor& text_VD) {
    const at::Tensor text_MD = text_VD.index_select(0, longs(rows.member));
    const at::Tensor placed = ot::barycentric(plan.plan_NM, text_MD);
    if (!codes.owner.defined()) return placed;
    // Codes that share a point keep their offsets to it, turned into text space and scaled like the points.
    const double scale = rms_deviation(placed) / std::max(rms_deviation(codes.points), 1e-300);
    const at::Tensor offset_NZ = in.codebook_NZ - codes.points.index_select(0, codes.owner);
    return placed.index_select(0, codes.owner) +
           at::mm(offset_NZ, polar_map(plan.plan_NM, codes.points, text_MD)) * scale;
  };
  return {place(in.text.embedding_VD), in.text.tied ? at::Tensor() : place(in.text.head_VD)};
}

CodeRows procrustes_rows(const RowsContext& in) {
  const Cloud codes = reduce(in.codebook_NZ, in.ot.max_points, in.seed),
              rows = reduce(in.text.embedding_VD, in.ot.max_points, in.seed + 1);
  const ot::Result plan = couple(codes, rows, in.ot);
  note_plan(in.report, plan);
  const at::Tensor z = in.codebook_NZ - in.codebook_NZ.mean(0);
  const auto turn = [&](const at::Tensor& text_VD) {
    return at::mm(z, polar_map(plan.plan_NM, codes.points, text_VD.index_select(0, longs(rows.member))));
  };
  if (in.codebook_NZ.size(1) < in.text.embedding_VD.size(1)) {
    in.report.warnings.push_back(detail::concat(config::name_of(in.report.method), ": codes of ",
                                                in.codebook_NZ.size(1), " dimensions give rows of rank at most ",
                                                in.codebook_NZ.size(1), " of ", in.text.embedding_VD.size(1)));
  }
  return {turn(in.text.embedding_VD), in.text.tied ? at::Tensor() : turn(in.text.head_VD)};
}

// Members of each cluster, nearest to the centre first.
std::vector<std::vector<int64_t>> members_by_distance(const at::Tensor& x_ND, const ot::KMeansResult& k,
                                                      int64_t clusters) {
  const at::Tensor distance = (x_ND - k.centres_KD.to(at::kDouble).index_select(0, k.assignment_N)).square().sum(1);
  const int64_t* own = k.assignment_N.const_data_ptr<int64_t>();
  const double* d = distance.const_data_ptr<double>();
  std::vector<std::vector<int64_t>> members(clusters);
  for (int64_t i = 0; i < x_ND.size(0); ++i) members[own[i]].push_back(i);
  for (auto& m : members) std::stable_sort(m.begin(), m.end(), [&](int64_t a, int64_t b) { return d[a] < d[b]; });
  return members;
}

CodeRows cluster_rows(const RowsContext& in) {
  const int64_t n = in.codebook_NZ.size(0), v = in.text.embedding_VD.size(0), kx = std::min(in.ot.clusters, n),
                ky = std::min(in.ot.clusters, v);
  std::optional<ot::Result> best;
  ot::KMeansResult codes, rows;
  for (int64_t restart = 0; restart < kClusterRestarts; ++restart) {
    const uint64_t own_seed = in.seed + uint64_t(restart) * 1000;
    ot::KMeansResult x = ot::kmeans(in.codebook_NZ, kx, {.restarts = 1, .seed = own_seed});
    ot::KMeansResult y =
        ot::kmeans(in.text.embedding_VD.to(at::kFloat), ky,
                   {.restarts = 1, .max_iterations = 20, .max_samples = 64 * ky, .seed = own_seed + 1});
    ot::Result plan = ot::solve(ot::Cost::squared_euclidean(x.centres_KD), ot::Cost::squared_euclidean(y.centres_KD),
                                solver_settings(in.ot, kx, ky), x.counts_K.to(at::kDouble) / double(n),
                                y.counts_K.to(at::kDouble) / double(v));
    if (best && plan.objective >= best->objective) continue;
    best = std::move(plan);
    codes = std::move(x);
    rows = std::move(y);
  }
  note_plan(in.report, *best);
  const auto code_members = members_by_distance(in.codebook_NZ, codes, kx),
             row_members = members_by_distance(in.text.embedding_VD, rows, ky);
  // Within a cluster a code takes a free row of a matched text cluster, at its own relative distance from the centre
  // (distances to the centre are what GW's first lower bound compares: Mémoli 2011).
  std::vector<char> taken(v, 0);
  std::vector<int64_t> ids(n, 0);
  const at::Tensor share = (best->plan_NM / best->plan_NM.sum(1, true)).contiguous();
  for (int64_t c = 0; c < kx; ++c) {
    const double* row = share[c].const_data_ptr<double>();
    const auto& members = code_members[c];
    // Which text cluster: by mass, with golden-ratio steps, so that the choice is not tied to the distance.
    for (size_t i = 0; i < members.size(); ++i) {
      const double at_distance = (double(i) + 0.5) / double(members.size());
      const double at_mass = std::fmod((double(i) + 0.5) * 0.6180339887498949, 1.0);
      double mass = 0;
      int64_t target = 0;
      for (int64_t j = 0; j < ky; ++j) {
        if (row[j] <= 0) continue;
        target = j;
        mass += row[j];
        if (mass > at_mass) break;
      }
      const auto& pool = row_members[target];
      const int64_t wanted = std::min<int64_t>(int64_t(at_distance * double(pool.size())), int64_t(pool.size()) - 1);
      int64_t chosen = pool[wanted];
      for (int64_t step = 0; step < int64_t(pool.size()); ++step) {
        const int64_t candidate = pool[(wanted + step) % int64_t(pool.size())];
        if (taken[candidate]) continue;
        chosen = candidate;
        break;
      }
      taken[chosen] = 1;
      ids[members[i]] = chosen;
    }
  }
  return gather_rows(in.text, ids);
}

std::vector<int64_t> sampled_ids(int64_t vocabulary, int64_t count, uint64_t seed) {
  std::vector<int64_t> ids;
  for (uint64_t round = 0; int64_t(ids.size()) < count; ++round) {  // more codes than text rows: whole rounds
    const auto order = Rng(seed, "graft.rows.sampled_rows", round).permutation(vocabulary);
    ids.insert(ids.end(), order.begin(), order.begin() + std::min(vocabulary, count - int64_t(ids.size())));
  }
  return ids;
}

CodeRows random_rows(const RowsContext& in) {
  const auto draw = [&](const at::Tensor& like, const char* purpose) {
    return normal({in.codebook_NZ.size(0), like.size(1)}, in.seed, purpose) *
           std::sqrt(like.square().mean().item<double>());
  };
  return {draw(in.text.embedding_VD, "graft.rows.random"),
          in.text.tied ? at::Tensor() : draw(in.text.head_VD, "graft.rows.random_head")};
}

CodeRows sampled_rows(const RowsContext& in) {
  return gather_rows(in.text, sampled_ids(in.text.embedding_VD.size(0), in.codebook_NZ.size(0), in.seed));
}

CodeRows moment_match_rows(const RowsContext& in) {
  const int64_t first = in.drawn.embedding_ND.size(0) - in.codebook_NZ.size(0);
  return {in.drawn.embedding_ND.slice(0, first), in.text.tied ? at::Tensor() : in.drawn.head_ND.slice(0, first)};
}

struct RowInitialiser {
  RowInit init;
  CodeRows (*rows)(const RowsContext&);
};
constexpr RowInitialiser kInitialisers[] = {
    {RowInit::random, random_rows},
    {RowInit::sampled_rows, sampled_rows},
    {RowInit::moment_match, moment_match_rows},
    {RowInit::gw_barycentric, barycentric_rows},
    {RowInit::gw_procrustes, procrustes_rows},
    {RowInit::gw_cluster, cluster_rows},
};
static_assert(std::ranges::equal(kInitialisers, kRowInits, {}, &RowInitialiser::init, &RowInitRow::value),
              "a function for each row of config.h's table, in its order");

void note_collapse(RowsReport& report) {
  const double spread = report.text.rms_deviation > 0 ? report.raw.rms_deviation / report.text.rms_deviation : 1.0;
  if (report.method == RowInit::gw_barycentric &&
      (spread < kCollapsedSpread ||
       report.raw.mean_cosine > std::max(kCollapsedCosine, report.text.mean_cosine + 0.3))) {
    report.warnings.push_back(detail::concat(config::name_of(report.method), ": the plan is too blunt (row perplexity ",
                                             report.row_perplexity, " of ", report.uniform_perplexity,
                                             "), rows collapsed to ", spread,
                                             " of the text rows' spread before rescaling: lower ot.epsilon or use ",
                                             config::name_of(RowInit::moment_match)));
  }
  if (report.used_gw && report.reason == "marginals not reached")
    report.warnings.push_back(detail::concat(
        config::name_of(report.method), ": Sinkhorn stopped before its marginals were exact; the plan was repaired"));
}

}  // namespace

RowStatistics row_statistics(const at::Tensor& rows_ND) {
  at::NoGradGuard no_grad;
  const at::Tensor x = rows_ND.detach().to(at::kCPU, at::kDouble);
  RowStatistics s;
  const at::Tensor norms = x.norm(2, {1}, true);
  s.mean_norm = norms.mean().item<double>();
  s.rms_deviation = rms_deviation(x);
  const at::Tensor centred = x - x.mean(0);
  const bool wide = x.size(1) > x.size(0);
  const at::Tensor singular =
      at::linalg_eigvalsh(wide ? at::mm(centred, centred.t()) : at::mm(centred.t(), centred)).clamp_min(0.0).sqrt();
  const double total = singular.sum().item<double>();
  if (total > 0) {
    const at::Tensor share = singular / total;
    s.effective_rank = std::exp(-at::special_xlogy(share, share).sum().item<double>());
  }
  const double n = double(x.size(0));
  if (n > 1) s.mean_cosine = ((x / norms.clamp_min(1e-300)).sum(0).square().sum().item<double>() - n) / (n * (n - 1));
  return s;
}

ot::Settings solver_settings(const ot::OtConfig& ot, int64_t n, int64_t m) {
  ot::Settings s;
  s.solver = ot.solver;
  s.epsilon = ot.epsilon;
  s.max_iterations = ot.max_iterations;
  s.tolerance = 1e-3 / std::sqrt(double(std::max(n, m)));  // a thousandth of a sharp plan's norm
  s.sinkhorn_iterations = 100;
  s.sinkhorn_tolerance = 1e-6;
  s.slack = 1.0;
  s.anneal_iterations = 30;
  s.sharpen = 5;
  s.sharpen_factor = 0.35;
  return s;
}

RowsInit initialise_rows(RowInit method, const at::Tensor& text_embedding_VD, const at::Tensor& text_head_VD,
                         const at::Tensor& codebook_NZ, int64_t num_special, const ot::OtConfig& ot, uint64_t seed) {
  at::NoGradGuard no_grad;
  Text text;
  text.embedding_VD = checked_matrix(text_embedding_VD, "text embedding");
  text.tied =
      !text_head_VD.defined() || text_head_VD.is_same(text_embedding_VD) ||
      (text_head_VD.const_data_ptr() == text_embedding_VD.const_data_ptr() &&
       text_head_VD.sizes() == text_embedding_VD.sizes() && text_head_VD.strides() == text_embedding_VD.strides());
  text.head_VD = text.tied ? text.embedding_VD : checked_matrix(text_head_VD, "text head");
  MOEGRAFT_CHECK(text.head_VD.sizes() == text.embedding_VD.sizes(), "row initialisation: text head ",
                 text.head_VD.sizes().vec(), " must have the embedding's shape ", text.embedding_VD.sizes().vec());
  const at::Tensor codebook = checked_matrix(codebook_NZ, "codebook");
  MOEGRAFT_CHECK(num_special >= 0, "row initialisation: number of special rows must not be negative, got ",
                 num_special);

  RowsInit init;
  RowsReport& report = init.report;
  report.method = method;
  report.used_gw = config::row_of(method).needs_ot;
  report.text = row_statistics(text.embedding_VD);
  const CodeRows drawn =
      moment_rows(text, num_special + (method == RowInit::moment_match ? codebook.size(0) : 0), seed);
  CodeRows codes = kInitialisers[size_t(method)].rows({text, codebook, drawn, ot, seed, report});
  report.raw = row_statistics(codes.embedding_ND);
  if (report.used_gw) {
    codes.embedding_ND = match_mean_and_scale(codes.embedding_ND, text.embedding_VD);
    if (!text.tied) codes.head_ND = match_mean_and_scale(codes.head_ND, text.head_VD);
  }
  report.embedding = row_statistics(codes.embedding_ND);
  report.head = text.tied ? report.embedding : row_statistics(codes.head_ND);
  note_collapse(report);

  init.embedding_ND =
      at::cat({drawn.embedding_ND.slice(0, 0, num_special), codes.embedding_ND}).to(at::kFloat).contiguous();
  init.head_ND = text.tied
                     ? init.embedding_ND
                     : at::cat({drawn.head_ND.slice(0, 0, num_special), codes.head_ND}).to(at::kFloat).contiguous();
  return init;
}

}  // namespace moegraft::graft
