#pragma once
// TensorBoard event files, written directly: TFRecord framing (u64 length, masked CRC32C of it, data, masked CRC32C of
// it) around protobuf Event messages. Fields used: Event{wall_time 1 double, step 2 int64, file_version 3, summary 5,
// session_log 7}, Summary{value 1}, Value{tag 1, simple_value 2 float, image 4}, Image{height 1, width 2, colorspace 3,
// encoded_image_string 4}, SessionLog{status 1: START = 1}.

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace moegraft::run {

uint32_t crc32c(std::string_view bytes);          // Castagnoli, as in RFC 3720
std::string frame_record(std::string_view data);  // TFRecord
std::string encode_scalar_event(double wall_time, int64_t step, std::string_view tag, float value);
std::string encode_image_event(double wall_time, int64_t step, std::string_view tag, int64_t height, int64_t width,
                               std::string_view png);
std::string encode_version_event(double wall_time);
std::string encode_start_event(double wall_time, int64_t step);

// One event file below `dir`. TensorBoard merges the files of a folder, so each session of a run writes its own.
class TensorBoard {
 public:
  // With resume_step >= 0 the file opens with a session start, at which TensorBoard drops what earlier files hold
  // beyond that step.
  explicit TensorBoard(const std::filesystem::path& dir, int64_t resume_step = -1);
  ~TensorBoard();
  TensorBoard(const TensorBoard&) = delete;
  TensorBoard& operator=(const TensorBoard&) = delete;

  void scalar(const std::string& tag, int64_t step, double value);
  void image(const std::string& tag, int64_t step, std::string_view png);  // UserError when it is not a PNG
  void image_file(const std::string& tag, int64_t step, const std::filesystem::path& png);
  const std::filesystem::path& path() const { return path_; }

 private:
  void write(const std::string& event);
  std::filesystem::path path_;
  int fd_ = -1;
  bool failed_ = false;
};

}  // namespace moegraft::run
