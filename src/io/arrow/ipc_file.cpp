// Arrow's IPC format, as streams (what datasets' cache and save_to_disk hold) and files. Mapped: what is not compressed
// is read where it lies.
#include <arrow/io/file.h>
#include <arrow/ipc/api.h>

#include <vector>

#include "moegraft/base/log.h"
#include "moegraft/io/mapped_files.h"
#include "table.h"

namespace moegraft::io {
namespace {

class IpcTable : public OpenTable {
 public:
  explicit IpcTable(const std::filesystem::path& path)
      : path_(path),
        file_(value_of(arrow::io::MemoryMappedFile::Open(path.string(), arrow::io::FileMode::READ), path)) {
    options_.use_threads = false;
    const int64_t bytes = value_of(file_->GetSize(), path);
    MOEGRAFT_CHECK(bytes > 0, path.string(), " is empty, expected an Arrow file");
    mapped_ = value_of(file_->ReadAt(0, bytes), path);
    note_mapping(mapped_->data(), size_t(mapped_->size()), path.string());
    try {
      open();
    } catch (...) {
      forget_mapping(mapped_->data());
      throw;
    }
  }
  ~IpcTable() override { forget_mapping(mapped_->data()); }

  const arrow::Schema& schema() const override { return *schema_; }

  void scan(const Take& take) override {
    if (!ended_)
      log::warning(path_.string(), " has no end mark behind its ", messages_.size(), " batches: it may be cut short");
    const int64_t parts = reader_ ? reader_->num_record_batches() : int64_t(messages_.size());
    for (int64_t part = 0; part < parts; ++part) take(part, 0, *read(part));
  }

  std::pair<std::shared_ptr<arrow::Array>, int64_t> cell(int64_t part, int64_t row, int column) override {
    if (!batch_ || part != part_) batch_ = read(part), part_ = part;
    return {batch_->column(column), row};
  }

 private:
  void open() {
    if (mapped_->size() >= 6 && std::string_view(*mapped_).starts_with("ARROW1")) {
      reader_ = value_of(arrow::ipc::RecordBatchFileReader::Open(file_, options_), path_);
      schema_ = reader_->schema();
      return;
    }
    // A stream has no table of its batches: they are found once. Their bodies stay in the mapping.
    check(file_->Seek(0), path_);
    auto first = value_of(arrow::ipc::ReadMessage(file_.get()), path_);
    MOEGRAFT_CHECK(first && first->type() == arrow::ipc::MessageType::SCHEMA, path_.string(),
                   " does not begin with a schema: it is no Arrow file");
    schema_ = value_of(arrow::ipc::ReadSchema(*first, &dictionaries_), path_);
    while (auto message = value_of(arrow::ipc::ReadMessage(file_.get()), path_)) {
      MOEGRAFT_CHECK(message->type() == arrow::ipc::MessageType::RECORD_BATCH, path_.string(),
                     " holds dictionary-encoded columns in a stream, which are not read: write it as Parquet "
                     "(datasets: d.to_parquet)");
      messages_.push_back(std::move(message));
    }
    // A writer that ended properly says so (the format's "Encapsulated message format"); a reader takes the end of the
    // file for it.
    using namespace std::string_view_literals;
    const size_t end = size_t(value_of(file_->Tell(), path_));
    ended_ = std::string_view(*mapped_).substr(0, end).ends_with("\xFF\xFF\xFF\xFF\0\0\0\0"sv);
  }

  std::shared_ptr<arrow::RecordBatch> read(int64_t part) {
    auto batch =
        reader_
            ? value_of(reader_->ReadRecordBatch(int(part)), path_)
            : value_of(arrow::ipc::ReadRecordBatch(*messages_[size_t(part)], schema_, &dictionaries_, options_), path_);
    check(batch->ValidateFull(), path_);  // offsets come out of the file as they are
    return batch;
  }

  std::filesystem::path path_;
  std::shared_ptr<arrow::io::MemoryMappedFile> file_;
  std::shared_ptr<arrow::Buffer> mapped_;
  arrow::ipc::IpcReadOptions options_ = arrow::ipc::IpcReadOptions::Defaults();
  arrow::ipc::DictionaryMemo dictionaries_;
  std::shared_ptr<arrow::Schema> schema_;
  std::shared_ptr<arrow::ipc::RecordBatchFileReader> reader_;   // a file
  std::vector<std::unique_ptr<arrow::ipc::Message>> messages_;  // a stream
  std::shared_ptr<arrow::RecordBatch> batch_;                   // the last one that a cell was taken of
  int64_t part_ = -1;
  bool ended_ = true;
};

}  // namespace

std::unique_ptr<OpenTable> open_arrow(const std::filesystem::path& path) {
  return guarded(path, [&] { return std::make_unique<IpcTable>(path); });
}

}  // namespace moegraft::io
