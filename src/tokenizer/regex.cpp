#include "regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"
#include "unicode.h"

namespace moegraft::tokenizer {

namespace {

// Oniguruma's \w (its tables count six Latin-1 numbers as word characters); PCRE2's own is L, N and _.
constexpr const char* kWord = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{B2}\\x{B3}\\x{B9}\\x{BC}-\\x{BE}";

// [:name:] inside a character class.
const char* posix_class(std::string_view name) {
  static const std::array<std::pair<const char*, const char*>, 10> kClasses{
      {{"upper", "\\p{Uppercase}"},
       {"lower", "\\p{Lowercase}"},
       {"alpha", "\\p{Alphabetic}"},
       {"alnum", "\\p{Alphabetic}\\p{Nd}"},
       {"digit", "\\p{Nd}"},
       {"punct", "\\p{P}\\p{S}"},
       {"space", "\\p{White_Space}"},
       {"xdigit", "0-9a-fA-F"},
       {"cntrl", "\\p{Cc}"},
       {"word", "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"}}};
  const auto it =
      std::find_if(kClasses.begin(), kClasses.end(), [&](const auto& entry) { return name == entry.first; });
  return it == kClasses.end() ? nullptr : it->second;
}

// \p{name}: Oniguruma reads a script as Script, PCRE2 (10.40 on) as Script_Extensions; and some names differ.
std::string property(std::string name) {
  const bool negated = name.starts_with('^');
  if (negated) name.erase(0, 1);
  static const std::array<std::pair<const char*, const char*>, 23> kNames{
      {{"Letter", "L"},
       {"Mark", "M"},
       {"Number", "N"},
       {"Punctuation", "P"},
       {"Punct", "P"},
       {"Symbol", "S"},
       {"Separator", "Z"},
       {"Other", "C"},
       {"Alpha", "Alphabetic"},
       {"Alphabetic", "Alphabetic"},
       {"Digit", "Nd"},
       {"Space", "White_Space"},
       {"White_Space", "White_Space"},
       {"Upper", "Uppercase"},
       {"Uppercase", "Uppercase"},
       {"Lower", "Lowercase"},
       {"Lowercase", "Lowercase"},
       {"Emoji", "Emoji"},
       {"Any", "Any"},
       {"Extended_Pictographic", "Extended_Pictographic"},
       {"Emoji_Presentation", "Emoji_Presentation"},
       {"Ideographic", "Ideographic"},
       {"Join_Control", "Join_Control"}}};
  const auto known = std::find_if(kNames.begin(), kNames.end(), [&](const auto& entry) { return name == entry.first; });
  if (known != kNames.end())
    name = known->second;
  else if (name.size() > 2)
    name = "sc:" + name;
  return (negated ? "^" : "") + name;
}

class Translator {
 public:
  Translator(const std::string& pattern, const std::string& place) : in_(pattern), place_(place) {}

  std::string run() {
    while (i_ < in_.size()) step();
    return std::move(out_);
  }

 private:
  [[noreturn]] void reject(const char* what) const {
    fail<UserError>(place_, ": ", what, " in the regular expression is not supported: ", shortened(in_, 200));
  }
  bool next_is(char c, size_t ahead = 1) const { return i_ + ahead < in_.size() && in_[i_ + ahead] == c; }
  void atom() { atom_ = out_.size(); }

  void step() {
    switch (in_[i_]) {
      case '\\':
        atom();
        escape(false);
        return;
      case '[':
        atom();
        char_class();
        return;
      case '(': group(); return;
      case ')':
        if (!groups_.empty()) atom_ = groups_.back(), groups_.pop_back();
        out_ += in_[i_++];
        return;
      case '{': braces(); return;
      default:
        if (std::string_view("?*+|").find(in_[i_]) == std::string_view::npos) atom();
        const size_t length = std::min(utf8_length(static_cast<unsigned char>(in_[i_])), in_.size() - i_);
        out_.append(in_, i_, length);
        i_ += length;
    }
  }

  void group() {
    groups_.push_back(out_.size());
    out_ += in_[i_++];
    if (i_ < in_.size() && in_[i_] == '*') reject("a verb (*...)");  // could lift the limits of matching
    if (i_ >= in_.size() || in_[i_] != '?') return;
    // Options: Ruby's m is PCRE2's s.
    size_t end = i_ + 1;
    while (end < in_.size() && std::string_view("imxa-").find(in_[end]) != std::string_view::npos) ++end;
    if (end == i_ + 1 || end >= in_.size() || (in_[end] != ':' && in_[end] != ')')) return;
    for (; i_ < end; ++i_) out_ += in_[i_] == 'm' ? 's' : in_[i_];
  }

  // X{n,m}+ repeats the whole in Ruby's syntax and is possessive in PCRE2's.
  void braces() {
    const size_t close = in_.find('}', i_);
    if (close == std::string::npos || in_.find_first_not_of("0123456789,", i_ + 1) != close || close == i_ + 1) {
      atom();
      out_ += "\\{";
      ++i_;
      return;
    }
    std::string range = in_.substr(i_, close - i_ + 1);
    if (range.starts_with("{,")) range.insert(1, "0");
    out_ += range;
    i_ = close + 1;
    if (i_ < in_.size() && in_[i_] == '+') {
      out_.insert(atom_, "(?:");
      out_ += ")";
    }
  }

  void escape(bool in_class) {
    if (i_ + 1 >= in_.size()) reject("a lone backslash");
    const char c = in_[i_ + 1];
    i_ += 2;
    const auto word = [&](bool negated) { return std::string(negated ? "[^" : "[") + kWord + "]"; };
    switch (c) {
      case 's': out_ += "\\p{White_Space}"; return;
      case 'S': out_ += "\\P{White_Space}"; return;
      case 'd': out_ += "\\p{Nd}"; return;
      case 'D': out_ += "\\P{Nd}"; return;
      case 'w': out_ += in_class ? kWord : word(false); return;
      case 'W':
        if (in_class) reject("\\W inside a character class");
        out_ += word(true);
        return;
      case 'h': out_ += in_class ? "0-9a-fA-F" : "[0-9a-fA-F]"; return;
      case 'H':
        if (in_class) reject("\\H inside a character class");
        out_ += "[^0-9a-fA-F]";
        return;
      case 'b':
        if (in_class)
          out_ += "\\x08";
        else
          out_ += "(?:(?<=" + word(false) + ")(?!" + word(false) + ")|(?<!" + word(false) + ")(?=" + word(false) + "))";
        return;
      case 'B':
        if (in_class) break;
        out_ += "(?:(?<=" + word(false) + ")(?=" + word(false) + ")|(?<!" + word(false) + ")(?!" + word(false) + "))";
        return;
      case 'u': {
        if (i_ + 4 > in_.size() || in_.find_first_not_of("0123456789abcdefABCDEF", i_) < i_ + 4)
          reject("\\u without four hexadecimal digits");
        out_ += "\\x{" + in_.substr(i_, 4) + "}";
        i_ += 4;
        return;
      }
      case 'p':
      case 'P': {
        if (i_ >= in_.size() || in_[i_] != '{') break;
        const size_t close = in_.find('}', i_);
        if (close == std::string::npos) reject("an unclosed \\p{");
        const std::string name = in_.substr(i_ + 1, close - i_ - 1);
        const char* group = name == "Alnum" ? posix_class("alnum") : name == "Word" ? kWord : nullptr;
        if (!group)
          out_ += std::string("\\") + c + "{" + property(name) + "}";
        else if (c == 'P')
          reject("\\P of a group of properties");
        else
          out_ += in_class ? std::string(group) : "[" + std::string(group) + "]";
        i_ = close + 1;
        return;
      }
      default: break;
    }
    out_ += '\\';
    out_ += c;
  }

  void char_class() {
    out_ += in_[i_++];
    if (i_ < in_.size() && in_[i_] == '^') out_ += in_[i_++];
    if (i_ < in_.size() && in_[i_] == ']') out_ += "\\]", ++i_;
    while (i_ < in_.size() && in_[i_] != ']') {
      if (in_[i_] == '\\') {
        escape(true);
      } else if (in_[i_] == '[' && next_is(':')) {
        const size_t close = in_.find(":]", i_);
        if (close == std::string::npos) reject("an unclosed [:");
        const char* members = posix_class(std::string_view(in_).substr(i_ + 2, close - i_ - 2));
        if (!members) reject("this [:name:]");
        out_ += members;
        i_ = close + 2;
      } else if (in_[i_] == '[') {
        reject("a nested character class");
      } else if (in_[i_] == '&' && next_is('&')) {
        reject("an intersection of character classes");
      } else {
        out_ += in_[i_++];
      }
    }
    if (i_ >= in_.size()) reject("an unclosed character class");
    out_ += in_[i_++];
  }

  const std::string& in_;
  const std::string& place_;
  std::string out_;
  size_t i_ = 0, atom_ = 0;
  std::vector<size_t> groups_;
};

constexpr size_t kMaxPattern = 1 << 14;  // bytes; the longest of real tokenizers has about 600
constexpr uint32_t kHeapKib = 256 * 1024;

// PCRE2 counts the steps from one starting position, so three bounds together hold for a text: steps from a position (a
// few for each byte are usual: a run of spaces is tried by each alternative), positions in one call, and the time that
// all calls took.
constexpr size_t kStarts = 512;
uint32_t steps_for(size_t bytes) {
  return static_cast<uint32_t>(std::min<size_t>(250'000 + 16 * bytes, 2'000'000'000));
}

// Time that this thread computed; others on the machine do not count.
double thread_seconds() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

struct Budget {
  bool open = false;
  double end = 0;
  uint32_t calls = 0;

  // Asks the clock, a system call, once in a while.
  bool spent() { return ++calls % 16 == 0 && thread_seconds() > end; }
};
thread_local Budget budget;

struct JitStack {
  JitStack()
      : stack(pcre2_jit_stack_create(32 * 1024, 8 * 1024 * 1024, nullptr)),
        context(pcre2_match_context_create(nullptr)) {
    if (stack && context) pcre2_jit_stack_assign(context, nullptr, stack);
    if (context) pcre2_set_heap_limit(context, kHeapKib);
  }
  ~JitStack() {
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
  JitStack(const JitStack&) = delete;
  pcre2_jit_stack* stack;
  pcre2_match_context* context;
};

// The position after the character at `at`; beyond the text at its end.
size_t next_character(std::string_view text, size_t at) {
  do ++at;
  while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return at;
}

std::string message_of(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

std::string regex_from_oniguruma(const std::string& pattern, const std::string& place) {
  return Translator(pattern, place).run();
}

std::string regex_escape(std::string_view literal) {
  std::string out;
  for (const char c : literal) {
    if (std::string_view("\\^$.[]|()?*+{}-#&~ \t\n\r").find(c) != std::string_view::npos) out += '\\';
    if (c == '\n')
      out += 'n';
    else if (c == '\r')
      out += 'r';
    else if (c == '\t')
      out += 't';
    else
      out += c;
  }
  return out;
}

RegexBudget::RegexBudget(size_t text_bytes) : outer_(!budget.open) {
  if (outer_) budget = {true, thread_seconds() + 1 + 2e-6 * static_cast<double>(text_bytes), 0};
}
RegexBudget::~RegexBudget() {
  if (outer_) budget.open = false;
}

Regex::Regex(const std::string& pattern, const std::string& place) : place_(place) {
  MOEGRAFT_CHECK(pattern.size() <= kMaxPattern, place, ": a regular expression of ", pattern.size(),
                 " bytes, expected at most ", kMaxPattern);
  MOEGRAFT_CHECK(is_valid_utf8(pattern), place, ": the regular expression is not valid UTF-8");
  const std::string translated = regex_from_oniguruma(pattern, place);
  const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  constexpr uint32_t kOptions =
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_USE_OFFSET_LIMIT;
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(), kOptions, &error,
                                   &offset, context.get());
  MOEGRAFT_CHECK(code != nullptr, place, ": the regular expression does not compile (", message_of(error), " at byte ",
                 offset, " of ", shortened(translated, 200), ")");
  code_ = std::shared_ptr<const void>(
      code, [](const void* p) { pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p))); });
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // without JIT pcre2_match interprets: slower, same matches
}

void Regex::find_all(std::string_view text, const std::function<void(size_t, size_t)>& found) const {
  thread_local JitStack jit;
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(pcre2_match_data_create(1, nullptr),
                                                                                 pcre2_match_data_free);
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  pcre2_set_match_limit(jit.context, steps_for(text.size()));
  const RegexBudget own(text.size());
  size_t at = 0, last_end = std::string_view::npos;
  while (at <= text.size()) {
    const size_t last_start = std::min(at + kStarts, text.size());
    pcre2_set_offset_limit(jit.context, last_start);
    int rc = pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK, data.get(), jit.context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
      rc = pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data.get(), jit.context);
    const bool none = rc == PCRE2_ERROR_NOMATCH;
    if (none && last_start == text.size()) return;
    const bool slow =
        rc == PCRE2_ERROR_MATCHLIMIT || rc == PCRE2_ERROR_HEAPLIMIT || rc == PCRE2_ERROR_DEPTHLIMIT || budget.spent();
    MOEGRAFT_CHECK(!slow, place_, ": the regular expression takes too long or too much memory on a text of ",
                   text.size(), " bytes: it tries too many ways to match");
    MOEGRAFT_CHECK(none || rc >= 0, place_, ": matching failed: ", message_of(rc));
    if (none) {
      at = next_character(text, last_start);
      continue;
    }
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data.get());
    const size_t begin = span[0], end = span[1];
    if (end > begin || begin != last_end) found(begin, end);
    last_end = end;
    at = end > begin ? end : next_character(text, end);
  }
}

}  // namespace moegraft::tokenizer
