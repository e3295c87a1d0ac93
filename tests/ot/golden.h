#pragma once
// Reads tests/golden/ot/pot.txt: blocks of "name rows columns" and the numbers.

#include <ATen/ATen.h>

#include <fstream>
#include <map>
#include <stdexcept>
#include <string>

#include "../support/paths.h"

namespace moegraft::ot {

inline const at::Tensor& golden(const std::string& name) {
  static const std::map<std::string, at::Tensor> blocks = [] {
    std::map<std::string, at::Tensor> read;
    std::ifstream in(test_source_dir() + "/tests/golden/ot/pot.txt");
    std::string key;
    int64_t rows, columns;
    while (in >> key >> rows >> columns) {
      at::Tensor t = at::empty({rows, columns}, at::kDouble);
      for (int64_t i = 0; i < rows * columns; ++i) in >> t.mutable_data_ptr<double>()[i];
      read.emplace(key, t);
    }
    return read;
  }();
  const auto found = blocks.find(name);
  if (found == blocks.end()) throw std::runtime_error("no golden block " + name + " in tests/golden/ot/pot.txt");
  return found->second;
}

inline double golden_value(const std::string& name) { return golden(name).item<double>(); }

}  // namespace moegraft::ot
