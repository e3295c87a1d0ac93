// Built without Apache Arrow (third_party/README.md): its files are told what would read them.
#include "moegraft/base/check.h"
#include "row_readers.h"

namespace moegraft::io {

class OpenTable {};

namespace {

// What makes an ImageFolder, in a folder NEW, of a table with a column "image".
[[noreturn]] void refuse(const std::filesystem::path& path, const char* kind, const char* loader) {
  fail(path.string(), " is ", kind,
       " file, and this moegraft was built without Apache Arrow: tools/setup.sh --arrow and build again; or make it "
       "files: python -c \"import datasets; d = datasets.Dataset.",
       loader, "('", path.string(),
       "'); n = [f'{i}.png' for i in range(len(d))]; [r['image'].save('NEW/' + f) for r, f in zip(d, n)]; "
       "d.remove_columns('image').add_column('file_name', n).to_json('NEW/metadata.jsonl')\"");
}

}  // namespace

void read_parquet(const std::filesystem::path& path, Rows&) { refuse(path, "a Parquet", "from_parquet"); }
void read_arrow(const std::filesystem::path& path, Rows&) { refuse(path, "an Arrow", "from_file"); }
bool reads_arrow() { return false; }

}  // namespace moegraft::io
