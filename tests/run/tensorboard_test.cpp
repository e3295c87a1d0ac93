#include "moegraft/run/tensorboard.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "../support/paths.h"
#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/image.h"

namespace fs = std::filesystem;

namespace moegraft::run {
namespace {

std::string hex(std::string_view bytes) {
  std::string text;
  for (const unsigned char byte : bytes) text += "0123456789abcdef"[byte >> 4], text += "0123456789abcdef"[byte & 15];
  return text;
}

TEST(TensorBoard, Crc32cKnownAnswers) {
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);            // the check value of CRC-32C
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);  // RFC 3720, B.4
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62A8AB43u);
}

TEST(TensorBoard, EventsAreTheSameBytesAsThePythonPackage) {
  // tests/golden/make_train.py writes these with tensorboard's own protobuf classes and record writer.
  std::ifstream file(test_source_dir() + "/tests/golden/train/events.txt");
  ASSERT_TRUE(file) << "golden file";
  std::map<std::string, std::string> golden;
  for (std::string name, value; file >> name >> value;) golden[name] = value;
  EXPECT_EQ(hex(frame_record(encode_version_event(1.5))), golden.at("version"));
  EXPECT_EQ(hex(frame_record(encode_start_event(1.5, 101))), golden.at("start"));
  EXPECT_EQ(hex(frame_record(encode_scalar_event(1.5, 300, "train/loss", 0.25f))), golden.at("scalar"));
  EXPECT_EQ(hex(frame_record(encode_scalar_event(1.5, 0, "train/loss", -3.5f))), golden.at("scalar_step_0"));
  EXPECT_EQ(hex(frame_record(encode_image_event(1.5, 7, "samples", 36, 200, "not a real png"))), golden.at("image"));
}

class TensorBoardFiles : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("moegraft_tb_" + std::to_string(getpid()));
    fs::remove_all(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  fs::path dir_;
};

TEST_F(TensorBoardFiles, PackageReadsThemAndDropsStepsOfAnAbandonedSession) {
  const fs::path python = test_source_dir() + "/.venv/bin/python";
  if (!fs::exists(python) || std::system((python.string() + " -c 'import tensorboard' 2>/dev/null").c_str()) != 0)
    GTEST_SKIP() << "no Python with tensorboard in .venv";
  fs::create_directories(dir_);
  const auto picture = dir_ / "picture.png";
  io::save_image(picture, at::full({3, 5, 9}, 128, at::kByte));
  {
    TensorBoard first(dir_ / "tb");
    for (int step = 1; step <= 5; ++step) first.scalar("train/loss", step, 10.0 - step);
    first.image_file("samples", 2, picture);
  }
  {
    TensorBoard second(dir_ / "tb", /*resume_step=*/3);
    second.scalar("train/loss", 4, 0.5);
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(dir_ / "tb"), fs::directory_iterator()), 2);
  const auto script = dir_ / "read.py";
  std::ofstream(script) << R"(
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
e = EventAccumulator(sys.argv[1]); e.Reload()
image = e.Images("samples")[0]
print(";".join(f"{s.step}:{s.value:g}" for s in e.Scalars("train/loss")), image.step, image.height, image.width, len(image.encoded_image_string))
)";
  const auto out = dir_ / "out.txt";
  ASSERT_EQ(std::system((python.string() + " " + script.string() + " " + (dir_ / "tb").string() + " > " + out.string() +
                         " 2>/dev/null")
                            .c_str()),
            0);
  EXPECT_EQ(io::read_file(out), "1:9;2:8;3:7;4:0.5 2 5 9 " + std::to_string(fs::file_size(picture)) + "\n");
}

TEST_F(TensorBoardFiles, RefusesWhatIsNoPng) {
  TensorBoard board(dir_);
  EXPECT_THROW(board.image("samples", 1, "JFIF, certainly not a PNG picture"), UserError);
}

}  // namespace
}  // namespace moegraft::run
