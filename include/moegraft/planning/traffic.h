#pragma once
// What one training step hands to the other processes, from shapes alone, in the units of distributed::Traffic: bytes
// that a process gives to collectives.

#include <vector>

#include "moegraft/planning/memory.h"

namespace moegraft::planning {

enum class Purpose { gradients, experts, base, updates, agreement };
enum class Collective { all_reduce, all_gather, all_to_all, broadcast };
enum class Group { world, expert, data };
const char* name_of(Purpose purpose);
const char* name_of(Collective collective);  // as `moegraft bench collectives` calls it

// Equal calls of one process. all_gather's bytes are its own part, all_to_all's all that it sends, itself included.
struct Message {
  Purpose purpose;
  Collective collective;
  Group group;
  double calls = 0, bytes_each = 0;
};

// Of a step of `micro_batches` with request.tokens tokens on every process, once the first step is over. The first
// recompute_layers layers run again (all of them where the base is sharded). Tokens choose experts evenly and every
// token needs gradients: a mean for exchanges with experts, exact for everything else.
std::vector<Message> count_traffic(const MemoryRequest& request, int64_t micro_batches, int64_t recompute_layers,
                                   double bucket_bytes);
double total_bytes(const std::vector<Message>& messages, Purpose purpose);

// Processes out of `parts` that a token visits when it chooses top_k of num_experts evenly and each holds an equal
// part: the mean.
double mean_visits(int64_t num_experts, int64_t top_k, int64_t parts);

}  // namespace moegraft::planning
