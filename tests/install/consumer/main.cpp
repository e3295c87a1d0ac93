// Uses the installed headers and libraries as a user's program would: exit code 0 means every step gave what it should.
#include <filesystem>
#include <fstream>
#include <iostream>

#include "moegraft/base/check.h"
#include "moegraft/tokenizer/tokenizer.h"

bool tensor_round_trip(const std::filesystem::path& dir);

int main() {
  namespace fs = std::filesystem;
  const fs::path dir = fs::current_path() / "scratch";
  fs::create_directories(dir);

  std::ofstream(dir / "text.txt") << "a red heart\na grinning face\na slice of pizza\na red face\na heart of pizza\n";
  moegraft::tokenizer::SentencePieceTraining options;
  options.vocab_size = 300;
  moegraft::tokenizer::train_sentencepiece({dir / "text.txt"}, dir, options);
  const auto tokenizer = moegraft::tokenizer::load_tokenizer(dir);
  const auto ids = tokenizer->encode("a red heart");
  if (ids.empty() || tokenizer->decode(ids) != "a red heart") {
    std::cerr << "tokenizer: '" << tokenizer->decode(ids) << "'\n";
    return 1;
  }
  try {
    moegraft::tokenizer::load_tokenizer(dir / "absent");
    return 1;
  } catch (const moegraft::UserError& e) { std::cout << "as expected: " << e.what() << "\n"; }
  return tensor_round_trip(dir) ? 0 : 1;
}
