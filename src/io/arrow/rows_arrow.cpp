// Rows of Parquet and Arrow files: columns are keys, text is taken over, pictures become places, numbers and other
// types mean nothing here.
#include "io/row_readers.h"
#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "table.h"

namespace moegraft::io {
namespace {

namespace fs = std::filesystem;

constexpr int kMostDepth = 64;

bool is_bytes(const arrow::DataType& type) {
  using arrow::Type;
  return type.id() == Type::BINARY || type.id() == Type::LARGE_BINARY || type.id() == Type::BINARY_VIEW ||
         type.id() == Type::FIXED_SIZE_BINARY;
}

// datasets' Image: struct<bytes: binary, path: string>, of which a pass over Parquet sees the path alone; or just
// bytes.
bool is_picture(const arrow::DataType& type) {
  if (type.id() == arrow::Type::DICTIONARY)
    return is_picture(*static_cast<const arrow::DictionaryType&>(type).value_type());
  if (type.id() != arrow::Type::STRUCT) return is_bytes(type);
  for (const auto& field : type.fields())
    if (field->name() != "bytes" && field->name() != "path") return false;
  return type.num_fields() > 0;
}

bool holds_bytes(const arrow::DataType& type) {
  if (is_bytes(type)) return true;
  for (const auto& field : type.fields())
    if (holds_bytes(*field->type())) return true;
  return false;
}

using OnPicture = std::function<Json(const arrow::Array& array, int64_t i)>;

template <class A>
Json list_of(const A& array, int64_t i, const OnPicture& on_picture, int depth);

// A value as JSON; pictures in it as on_picture says, in their order. Null: absent, or of a scalar type that means
// nothing.
Json to_json(const arrow::Array& array, int64_t i, const OnPicture& on_picture, int depth = 0) {
  if (array.IsNull(i) || depth > kMostDepth) return nullptr;
  if (array.type_id() != arrow::Type::DICTIONARY && is_picture(*array.type())) return on_picture(array, i);
  switch (array.type_id()) {
    case arrow::Type::STRING: return std::string(static_cast<const arrow::StringArray&>(array).GetView(i));
    case arrow::Type::STRING_VIEW: return std::string(static_cast<const arrow::StringViewArray&>(array).GetView(i));
    case arrow::Type::LARGE_STRING: return std::string(static_cast<const arrow::LargeStringArray&>(array).GetView(i));
    case arrow::Type::DICTIONARY: {
      const auto& coded = static_cast<const arrow::DictionaryArray&>(array);
      return to_json(*coded.dictionary(), coded.GetValueIndex(i), on_picture, depth + 1);
    }
    case arrow::Type::LIST: return list_of(static_cast<const arrow::ListArray&>(array), i, on_picture, depth);
    case arrow::Type::LARGE_LIST:
      return list_of(static_cast<const arrow::LargeListArray&>(array), i, on_picture, depth);
    case arrow::Type::FIXED_SIZE_LIST:
      return list_of(static_cast<const arrow::FixedSizeListArray&>(array), i, on_picture, depth);
    case arrow::Type::LIST_VIEW: return list_of(static_cast<const arrow::ListViewArray&>(array), i, on_picture, depth);
    case arrow::Type::LARGE_LIST_VIEW:
      return list_of(static_cast<const arrow::LargeListViewArray&>(array), i, on_picture, depth);
    case arrow::Type::BOOL: return static_cast<const arrow::BooleanArray&>(array).Value(i);
    case arrow::Type::INT32: return static_cast<const arrow::Int32Array&>(array).Value(i);
    case arrow::Type::INT64: return static_cast<const arrow::Int64Array&>(array).Value(i);
    case arrow::Type::DOUBLE: return static_cast<const arrow::DoubleArray&>(array).Value(i);
    case arrow::Type::STRUCT: {
      const auto& fields = static_cast<const arrow::StructArray&>(array);
      Json json = Json::object();
      for (int f = 0; f < fields.num_fields(); ++f)
        if (Json value = to_json(*fields.field(f), i, on_picture, depth + 1); !value.is_null())
          json[array.type()->field(f)->name()] = std::move(value);
      return json;
    }
    default:
      return arrow::is_nested(array.type_id()) ? Json::object()
                                               : Json();  // not null: who takes text there says that it is none
  }
}

template <class A>
Json list_of(const A& array, int64_t i, const OnPicture& on_picture, int depth) {
  Json json = Json::array();
  for (int64_t k = 0; k < array.value_length(i); ++k)
    json.push_back(to_json(*array.values(), array.value_offset(i) + k, on_picture, depth + 1));
  return json;
}

void check_text(const Json& json, const std::string& where) {
  if (json.is_string())
    check_utf8(json.get_ref<const std::string&>(), where);
  else if (json.is_structured())
    for (const auto& value : json) check_text(value, where);
}

std::string bytes_at(const arrow::Array& array, int64_t i) {
  if (array.IsNull(i)) return {};
  if (array.type_id() == arrow::Type::BINARY_VIEW)
    return std::string(static_cast<const arrow::BinaryViewArray&>(array).GetView(i));
  if (array.type_id() == arrow::Type::FIXED_SIZE_BINARY)
    return std::string(static_cast<const arrow::FixedSizeBinaryArray&>(array).GetView(i));
  if (array.type_id() == arrow::Type::BINARY || array.type_id() == arrow::Type::STRING)
    return std::string(static_cast<const arrow::BinaryArray&>(array).GetView(i));
  if (array.type_id() == arrow::Type::LARGE_BINARY || array.type_id() == arrow::Type::LARGE_STRING)
    return std::string(static_cast<const arrow::LargeBinaryArray&>(array).GetView(i));
  return {};
}

class TableStore : public PictureStore {
 public:
  TableStore(const fs::path& path, OpenFunction open, std::shared_ptr<OpenFiles> files)
      : PictureStore(path),
        open_(open),
        files_(std::move(files)),
        bytes_(fs::file_size(path)),
        modified_(fs::last_write_time(path)) {}

  struct Place {
    int64_t number, part, row;  // number: in the file, from 0; row: in the part
    int column, nth;            // which of the pictures in this cell
  };
  void name_columns(const arrow::Schema& schema) { columns_ = schema.field_names(); }
  int64_t add(const Place& place) {
    places_.push_back(place);
    return int64_t(places_.size()) - 1;
  }

  std::string name(int64_t index) const override {
    const Place& at = places_[size_t(index)];
    return detail::concat(path().string(), ": row ", at.number, ", ", printable(columns_[size_t(at.column)]),
                          at.nth ? "[" + std::to_string(at.nth) + "]" : "");
  }

  std::string read(int64_t index) const override {
    const std::lock_guard lock(files_->lock);
    std::error_code error;
    if (fs::file_size(path(), error) != bytes_ || fs::last_write_time(path(), error) != modified_)
      fail<SourceChanged>(path().string(), " was changed while it is in use: start again");
    if (files_->table_owner != this) {
      files_->table_owner = nullptr;
      files_->table = open_(path());
      files_->table_owner = this;
    }
    return guarded(path(), [&] { return read_from(*files_->table, index); });
  }

 private:
  std::string read_from(OpenTable& table, int64_t index) const {
    const Place& at = places_[size_t(index)];
    const auto [array, i] = table.cell(at.part, at.row, at.column);
    std::string bytes, file;
    int nth = 0;
    to_json(*array, i, [&](const arrow::Array& picture, int64_t k) -> Json {
      if (nth++ != at.nth) return nullptr;
      if (is_bytes(*picture.type())) {
        bytes = bytes_at(picture, k);
        return nullptr;
      }
      const auto& fields = static_cast<const arrow::StructArray&>(picture);
      for (int f = 0; f < fields.num_fields(); ++f)
        (picture.type()->field(f)->name() == "bytes" ? bytes : file) = bytes_at(*fields.field(f), k);
      return nullptr;
    });
    if (!bytes.empty()) return bytes;
    MOEGRAFT_CHECK(!file.empty(), name(index), ": there is no picture in this cell, neither bytes nor a path");
    return read_file(path().parent_path() / file);
  }

  OpenFunction open_;
  std::shared_ptr<OpenFiles> files_;
  std::vector<std::string> columns_;
  std::vector<Place> places_;
  uintmax_t bytes_;
  fs::file_time_type modified_;
};

void read_table(const fs::path& path, Rows& rows, OpenFunction open) {
  std::error_code error;
  MOEGRAFT_CHECK(fs::is_regular_file(path, error), "cannot read ", path.string(), ": no such file");
  const auto table = open(path);
  const auto& schema = table->schema();
  for (const auto& field : schema.fields())
    MOEGRAFT_CHECK(schema.GetAllFieldIndices(field->name()).size() == 1, path.string(), ": column ",
                   shortened(field->name()), " comes twice; rename one");
  const auto store = std::make_shared<TableStore>(path, open, rows.open());
  store->name_columns(schema);
  int64_t number = 0;
  const auto row_of = [&](int64_t part, int64_t first, const arrow::RecordBatch& batch, int64_t i,
                          const std::string& where) {
    Row row;
    row.where = where, row.number = number + 1, row.folder = folder_of(path);
    row.json = Json::object();
    for (int column = 0; column < schema.num_fields(); ++column) {
      const auto& field = *schema.field(column);
      int nth = 0;
      const auto place = [&]() -> Json {
        const std::string name = detail::concat("(", field.name(), " ", nth, ")");
        row.pictures[name] = Picture(store, store->add({number, part, first + i, column, nth}));
        ++nth;
        return name;
      };
      const auto values = batch.GetColumnByName(field.name());
      Json value = values ? to_json(*values, i, [&](const arrow::Array&, int64_t) { return place(); }) : Json();
      if (!values && is_picture(*field.type()))
        value = place();  // bytes that a pass does not decode: whether there are any shows when they are read
      check_text(value, where);
      if (!value.is_null() || (values && is_picture(*field.type())))
        row.json[field.name()] = std::move(value);  // a picture that is lost is not one that never was
    }
    return row;
  };
  guarded(path, [&] {
    table->scan([&](int64_t part, int64_t first, const arrow::RecordBatch& batch) {
      const auto listed =
          batch.GetColumnByName("images")
              ? nullptr
              : schema.GetFieldByName("images");  // how many a row has cannot be told without decoding them
      MOEGRAFT_CHECK(!listed || !holds_bytes(*listed->type()), path.string(), ": column images is ",
                     listed->type()->ToString(),
                     ", expected list<struct<bytes: binary, path: string>>: cast it (datasets: Sequence(Image()))");
      for (int64_t i = 0; i < batch.num_rows(); ++i, ++number) {
        const std::string where = path.string() + ": row " + std::to_string(number);
        rows.add(where, [&] { return row_of(part, first, batch, i, where); });
      }
    });
  });
}

}  // namespace

void read_parquet(const fs::path& path, Rows& rows) { read_table(path, rows, open_parquet); }
void read_arrow(const fs::path& path, Rows& rows) { read_table(path, rows, open_arrow); }
bool reads_arrow() { return true; }

}  // namespace moegraft::io
