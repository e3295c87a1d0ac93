// Parquet. A pass decodes the text alone; a column of pictures is decoded page by page, a few rows at a time. Pages are
// as large as the writer made them: pyarrow puts up to 1,024 pictures into one, of which about twice the size is in
// memory for a while.
#include <arrow/io/file.h>
#include <parquet/arrow/reader.h>
#include <parquet/file_reader.h>
#include <parquet/schema.h>
#include <parquet/types.h>

#include <map>
#include <vector>

#include "table.h"

namespace moegraft::io {
namespace {

constexpr int64_t kTextRows = 1024, kPictureRows = 16;  // decoded at a time

class ParquetTable : public OpenTable {
 public:
  explicit ParquetTable(const std::filesystem::path& path) : path_(path) {
    auto properties = parquet::default_reader_properties();
    properties.enable_buffered_stream();  // pages, not whole column chunks
    parquet::ArrowReaderProperties arrow_properties(/*use_threads=*/false);
    arrow_properties.set_pre_buffer(false);
    parquet::arrow::FileReaderBuilder builder;
    check(builder.Open(value_of(arrow::io::ReadableFile::Open(path.string()), path), properties), path);
    builder.properties(arrow_properties);
    reader_ = value_of(builder.Build(), path);
    check(reader_->GetSchema(&schema_), path);
    const auto& columns = *reader_->parquet_reader()->metadata()->schema();
    leaves_.resize(size_t(schema_->num_fields()));
    for (int i = 0; i < columns.num_columns(); ++i) {
      const int top = columns.group_node()->FieldIndex(*columns.GetColumnRoot(i));
      MOEGRAFT_CHECK(top >= 0 && top < schema_->num_fields(), path.string(),
                     ": its schema names a column that is not there");
      leaves_[size_t(top)].push_back(i);
      const auto& type = columns.Column(i)->logical_type();
      if (columns.Column(i)->physical_type() == parquet::Type::BYTE_ARRAY && type &&
          (type->is_string() || type->is_JSON() || type->is_enum()))
        texts_.push_back(i);
    }
  }

  const arrow::Schema& schema() const override { return *schema_; }

  void scan(const Take& take) override {
    reader_->set_batch_size(kTextRows);
    for (int part = 0; part < reader_->num_row_groups(); ++part) {
      const auto batches = value_of(reader_->GetRecordBatchReader({part}, texts_), path_);
      int64_t first = 0;
      for (std::shared_ptr<arrow::RecordBatch> batch; check(batches->ReadNext(&batch), path_), batch;
           first += batch->num_rows())
        take(part, first, *batch);
    }
  }

  std::pair<std::shared_ptr<arrow::Array>, int64_t> cell(int64_t part, int64_t row, int column) override {
    Cursor& at = cursors_[column];
    if (!at.batches || at.part != part || row < at.first) {
      reader_->set_batch_size(kPictureRows);
      at = {part, 0, value_of(reader_->GetRecordBatchReader({int(part)}, leaves_[size_t(column)]), path_), nullptr};
    }
    while (!at.batch || row >= at.first + at.batch->num_rows()) {
      if (at.batch) at.first += at.batch->num_rows();
      check(at.batches->ReadNext(&at.batch), path_);
      if (!at.batch) {
        at.batches = nullptr;
        damaged(path_, "a row group ends early");
      }
    }
    return {at.batch->column(0), row - at.first};
  }

 private:
  struct Cursor {
    int64_t part = 0, first = 0;
    std::unique_ptr<arrow::RecordBatchReader> batches;
    std::shared_ptr<arrow::RecordBatch> batch;
  };
  std::filesystem::path path_;
  std::unique_ptr<parquet::arrow::FileReader> reader_;
  std::shared_ptr<arrow::Schema> schema_;
  std::vector<std::vector<int>> leaves_;  // of each column
  std::vector<int> texts_;                // leaves that hold text
  std::map<int, Cursor> cursors_;         // by column
};

}  // namespace

std::unique_ptr<OpenTable> open_parquet(const std::filesystem::path& path) {
  return guarded(path, [&] { return std::make_unique<ParquetTable>(path); });
}

}  // namespace moegraft::io
