#pragma once
// How the ranks find each other: the store, and who has come.

#include <string>
#include <vector>

#include "shared.h"

namespace moegraft::distributed {

bool is_loopback(const std::string& host);  // an address of this machine alone, or "localhost"

// Connects to the store (rank 0 serves it, unless the launcher's agent does) and waits until every rank has. The stores
// returned in `shared` are this start's own: keys of an earlier start on the same server are out of sight. UserError
// names the ranks that did not come.
void meet(Shared& shared);

// Waits until rank r has posted prefix + r, for every r but this one; values in rank order, this rank's own as given.
// UserError: who did not, within the timeout; `purpose` says what for.
std::vector<std::string> collect(const Shared& shared, const std::string& prefix, const std::string& mine,
                                 const std::string& purpose);

}  // namespace moegraft::distributed
