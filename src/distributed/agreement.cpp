#include "agreement.h"

#include <algorithm>
#include <charconv>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "rendezvous.h"

namespace moegraft::distributed {
namespace {

struct Statement {
  std::optional<std::string> error;
  std::vector<World::Fact> facts;
};

// Length-prefixed strings: "5:hello". The error first (with a mark), then name and value of every fact.
void put(std::string& out, const std::string& text) { out += std::to_string(text.size()) + ':' + text; }

std::string encode(const std::vector<World::Fact>& facts, const std::optional<std::string>& error) {
  std::string out;
  std::string first;
  if (error) first = "!" + *error;
  put(out, first);
  for (const auto& fact : facts) put(out, fact.name), put(out, fact.value);
  return out;
}

Statement decode(const std::string& text, int64_t rank) {
  std::vector<std::string> parts;
  for (size_t at = 0; at < text.size();) {
    size_t length = 0;
    const auto [end, bad] = std::from_chars(text.data() + at, text.data() + text.size(), length);
    const size_t begin = static_cast<size_t>(end - text.data()) + 1;
    MOEGRAFT_CHECK(
        bad == std::errc() && begin <= text.size() && text[begin - 1] == ':' && length <= text.size() - begin, "rank ",
        rank, " sent something else than its facts: is it another version of moegraft?");
    parts.push_back(text.substr(begin, length));
    at = begin + length;
  }
  MOEGRAFT_CHECK(parts.size() % 2 == 1, "rank ", rank,
                 " sent something else than its facts: is it another version of moegraft?");
  Statement s;
  if (!parts[0].empty()) s.error = parts[0].substr(1);
  for (size_t i = 1; i < parts.size(); i += 2) s.facts.push_back({parts[i], parts[i + 1]});
  return s;
}

std::string shortened(std::string text) {
  constexpr size_t kLongest = 100;
  if (text.size() <= kLongest) return text;
  text.resize(kLongest);
  while (!text.empty() && (text.back() & 0x80) != 0) text.pop_back();  // no half of a UTF-8 character
  text += " ...";
  return text;
}

// The first line that differs; values may be whole configurations.
std::pair<std::string, std::string> first_difference(const std::string& a, const std::string& b) {
  const auto lines_a = split(a, '\n'), lines_b = split(b, '\n');
  for (size_t i = 0; i < std::max(lines_a.size(), lines_b.size()); ++i) {
    static const std::string nothing = "nothing";
    const std::string x = i < lines_a.size() ? trim(lines_a[i]) : nothing,
                      y = i < lines_b.size() ? trim(lines_b[i]) : nothing;
    if (x != y) return {shortened(x), shortened(y)};
  }
  return {shortened(a), shortened(b)};
}

// The line that says how the ranks differ in a fact of rank 0's; empty where they agree.
std::string difference(const World::Fact& fact, const std::vector<Statement>& all) {
  std::vector<int64_t> others;
  std::string theirs;
  for (size_t r = 1; r < all.size(); ++r) {
    const auto& facts = all[r].facts;
    const auto it = std::find_if(facts.begin(), facts.end(), [&](const World::Fact& f) { return f.name == fact.name; });
    const std::string value = it == facts.end() ? std::string() : it->value;
    if (value == fact.value) continue;
    if (others.empty()) theirs = value;
    others.push_back(static_cast<int64_t>(r));
  }
  if (others.empty()) return {};
  const auto [ours, first] = first_difference(fact.value, theirs);
  return detail::concat(fact.name, " differs between ranks: rank 0 has '", ours, "', ", name_ranks(others),
                        others.size() == 1 ? " has '" : " have others, the first '", first,
                        "': start all ranks with the same");
}

}  // namespace

void reach_agreement(const Shared& shared, int64_t number, const std::vector<World::Fact>& facts,
                     const std::optional<std::string>& error) {
  std::vector<std::string> texts;
  try {
    texts =
        collect(shared, detail::concat("agree/", number, '/'), encode(facts, error), "agreement before the first step");
  } catch (const UserError&) {
    if (error) throw UserError(*error);  // this rank's own trouble says more than who did not answer
    throw;
  }
  std::vector<Statement> all;
  for (size_t r = 0; r < texts.size(); ++r) all.push_back(decode(texts[r], static_cast<int64_t>(r)));

  std::vector<int64_t> failed;
  for (size_t r = 0; r < all.size(); ++r) {
    if (all[r].error) failed.push_back(static_cast<int64_t>(r));
  }
  if (!failed.empty()) {
    const std::string first = *all[static_cast<size_t>(failed[0])].error;
    const bool same = std::all_of(failed.begin(), failed.end(),
                                  [&](int64_t r) { return *all[static_cast<size_t>(r)].error == first; });
    if (failed.size() == all.size() && same) throw UserError(first);
    if (same) throw UserError(name_ranks(failed) + ": " + first);
    std::string line;
    for (const int64_t r : failed)
      line += detail::concat(line.empty() ? "" : "; ", "rank ", r, ": ", *all[static_cast<size_t>(r)].error);
    throw UserError(line);
  }
  for (const auto& fact : all[0].facts) {
    const std::string line = difference(fact, all);
    MOEGRAFT_CHECK(line.empty(), line);
  }
  for (size_t r = 1; r < all.size(); ++r) {
    for (const auto& fact : all[r].facts) {
      const bool known = std::any_of(all[0].facts.begin(), all[0].facts.end(),
                                     [&](const World::Fact& f) { return f.name == fact.name; });
      MOEGRAFT_CHECK(known, fact.name, " differs between ranks: rank ", r, " has '", shortened(fact.value),
                     "', rank 0 does not know it: start all ranks with the same binary");
    }
  }
}

}  // namespace moegraft::distributed
