#include "attention_choice.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "cudnn_attention.h"
#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "moegraft/kernels/device_numerics.h"

namespace moegraft::kernels {
namespace {

constexpr std::array<const char*, 2> kNames{"flash", "cudnn"};  // of DeviceAttention
std::atomic<int> wanted_kernel{-1};                             // -1: none

constexpr int64_t kOldestCudnn = 91800;  // ordered, packed, grouped and bottom-right at once, on Hopper and Blackwell
constexpr int64_t kLargestWorkspace = int64_t{2} << 30;  // bytes: beyond, memory is worth more than the kernel's speed
constexpr int64_t kLargestOffset = (int64_t{1} << 31) - 1;  // ragged offsets are int32, in elements

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}
// Few steps where sequences are short; where they are long the work grows with the square.
int64_t length_bucket(int64_t n) { return n <= 1024 ? std::max<int64_t>(128, power_of_two(n)) : round_up(n, 1024); }

}  // namespace

AttentionShape attention_shape(const AttentionProblem& p) {
  AttentionShape s;
  s.bfloat16 = p.q_THC.scalar_type() == at::kBFloat16;
  s.heads = p.heads(), s.groups = p.groups(), s.head_dim = p.head_dim(), s.window = p.window;
  s.sequences = p.num_sequences(), s.queries = p.q_THC.size(0), s.keys = p.k_SGC.size(0);
  for (size_t i = 0; i + 1 < p.cu_q.size(); ++i) {
    s.longest_q = std::max(s.longest_q, p.cu_q[i + 1] - p.cu_q[i]);
    s.longest_kv = std::max(s.longest_kv, p.cu_kv[i + 1] - p.cu_kv[i]);
  }
  return s;
}

AttentionBucket bucket_of(const AttentionShape& s) {
  return {power_of_two(s.sequences), length_bucket(s.longest_q), length_bucket(s.longest_kv), length_bucket(s.queries),
          length_bucket(s.keys)};
}

int64_t deterministic_workspace_bytes(const AttentionBucket& b, int64_t heads) {
  return 2 * b.sequences * heads * round_up(b.longest_q, 64) * round_up(b.longest_kv, 128);
}

std::vector<std::string> attention_choices() {
  std::vector<std::string> names{"auto"};
  names.insert(names.end(), kNames.begin(), kNames.end());
  return names;
}

void prefer_device_attention(const std::string& kernel, const std::string& whose) {
  const auto names = attention_choices();
  const auto named = std::find(names.begin(), names.end(), kernel);
  MOEGRAFT_CHECK_USAGE(named != names.end(), whose, " must be one of ", join(names, ", "), ", got \"", kernel, "\"");
  wanted_kernel = int(named - names.begin()) - 1;
}

std::optional<DeviceAttention> wanted_attention() {
  const int kernel = wanted_kernel;
  return kernel < 0 ? std::nullopt : std::optional(DeviceAttention(kernel));
}

AttentionChoice choose_attention(const AttentionShape& s, std::optional<DeviceAttention> wanted) {
  using moegraft::detail::concat;
  const auto flash = [](std::string why) { return AttentionChoice{DeviceAttention::flash, std::move(why)}; };
  if (!wanted)
    return flash(
        "the default; cuDNN's (--attention cudnn, model.attention: cudnn) has not been compared with it on a GPU yet");
  if (*wanted == DeviceAttention::flash) return flash("asked for");
  if (s.cudnn_version == 0)
    return flash(
        "this build has no cuDNN attention: cudnn-frontend's headers were not there "
        "(third_party/requirements-cudnn-frontend.txt)");
  if (s.cudnn_version < kOldestCudnn) return flash(concat("cuDNN ", s.cudnn_version, " is older than ", kOldestCudnn));
  if (s.generation < 9)
    return flash(concat("cuDNN has no deterministic backward pass over packed sequences on compute capability ",
                        s.generation, ".x"));
  if (s.generation > 10)
    return flash(concat("compute capability ", s.generation, ".x: not known to cuDNN's deterministic backward pass"));
  if (!s.bfloat16) return flash("only bfloat16 goes to cuDNN");
  if (s.head_dim % 16 != 0 || s.head_dim > 128)
    return flash(concat("heads of ", s.head_dim, ": cuDNN takes multiples of 16 up to 128"));
  if (s.queries == 0 || s.keys == 0) return flash("no rows");
  if (std::max(s.queries * s.heads, s.keys * s.groups) * s.head_dim > kLargestOffset)
    return flash("offsets into so many rows do not fit 32 bits");
  if (const int64_t bytes = deterministic_workspace_bytes(bucket_of(s), s.heads); bytes > kLargestWorkspace)
    return flash(concat("cuDNN's deterministic backward pass would hold ", bytes >> 20, " MiB for ", s.sequences,
                        " sequences of up to ", s.longest_kv, " tokens"));
  return {DeviceAttention::cudnn, "asked for"};
}

std::string describe_device_attention() {
  const int64_t version = cudnn_attention_version();
  if (version < 0) return "";
  AttentionShape shape;
  shape.cudnn_version = version;
  const AttentionChoice choice = choose_attention(shape, wanted_attention());
  return choice.kernel == DeviceAttention::cudnn
             ? moegraft::detail::concat("cuDNN ", version, " where it serves, else flash (", choice.why, ")")
             : "flash (" + choice.why + ")";
}

}  // namespace moegraft::kernels
