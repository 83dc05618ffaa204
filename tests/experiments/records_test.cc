#include "experiments/records.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace canopy {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::string FreshFolder(const std::string& name) {
  const std::string folder =
      (std::filesystem::path(::testing::TempDir()) / ("canopy_records_" + name)).string();
  std::filesystem::remove_all(folder);
  return folder;
}

std::string Slurp(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  text << stream.rdbuf();
  return text.str();
}

QuestionRecord MakeRecord(int64_t question, int repetition = 0) {
  QuestionRecord record;
  record.run = "0123456789abcdef";
  record.arm = "draft chain:2";
  record.repetition = repetition;
  record.question_id = question;
  record.category = "writing";
  TurnRecord turn;
  turn.prompt_tokens = 11;
  turn.tokens = {5, 6, 7, 2};
  turn.text = "h\xc3\xa9llo \"x\"\n";
  turn.finish = "end_of_text";
  turn.accept_lengths = {3, 1};
  turn.seconds = {0.125, 0.25, 0.5, 0.0625, 0.03125, 1.0, 0.6875};
  record.turns = {turn, turn};
  record.turns[1].tokens = {9};
  record.turns[1].accept_lengths = {1};
  record.by_depth = {{3, 4, 2}, {2, 2, 1}};
  record.by_rank = {{3, 6, 3}};
  record.state = {100, 200, 8, 16, 4000, 7};
  return record;
}

RecordContext MakeContext() {
  RecordContext context;
  context.config.target_model = "models/t";
  context.config.sampling_temperature = 0.1;
  context.config.sampling_seed = 42;
  context.target_hash = "aa";
  context.draft_hash = "bb";
  context.target_dtype = "bf16";
  context.draft_dtype = "f32";
  context.device = "cpu (test)";
  context.draft_bytes = 77;
  return context;
}

void ExpectSame(const QuestionRecord& a, const QuestionRecord& b) {
  // The line carries every field; the time of writing is the only one that may differ.
  const auto fields = [](const QuestionRecord& record) {
    json parsed = json::parse(*RecordLine(record, MakeContext()));
    parsed.erase("time");
    return parsed;
  };
  EXPECT_EQ(fields(a), fields(b));
}

TEST(RecordsTest, LineCarriesWhatDesignAsksFor) {
  const absl::StatusOr<std::string> line = RecordLine(MakeRecord(81), MakeContext());
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->find('\n'), std::string::npos);
  const json parsed = json::parse(*line);
  EXPECT_EQ(parsed["schema"], kRecordSchema);
  EXPECT_EQ(parsed["question_id"], 81);
  EXPECT_TRUE(parsed["error"].is_null());
  EXPECT_FALSE(parsed["canopy"]["revision"].get<std::string>().empty());
  EXPECT_EQ(parsed["config"]["sampling.temperature"], 0.1);
  EXPECT_EQ(parsed["config"].size(), ConfigKeys().size());
  EXPECT_EQ(parsed["checkpoints"]["target"], "aa");
  EXPECT_EQ(parsed["checkpoints"]["draft"], "bb");
  EXPECT_EQ(parsed["device"], "cpu (test)");
  EXPECT_EQ(parsed["dtype"]["target"], "bf16");
  EXPECT_EQ(parsed["seed"], 42);
  EXPECT_EQ(parsed["bytes"]["pending_per_node"], 16);
  EXPECT_EQ(parsed["bytes"]["drafter"], 77);
  EXPECT_EQ(parsed["turns"][0]["tokens"], json({5, 6, 7, 2}));
  EXPECT_EQ(parsed["turns"][0]["text"], "h\xc3\xa9llo \"x\"\n");
  for (const char* phase : {"prefill", "draft", "verify", "accept", "commit", "total", "device"}) {
    EXPECT_TRUE(parsed["turns"][0]["seconds"][phase].is_number()) << phase;
  }
}

TEST(RecordsTest, LineIsReadBack) {
  RecordContext context;
  const auto record = ParseRecordLine(*RecordLine(MakeRecord(81, 3), MakeContext()), &context);
  ASSERT_TRUE(record.ok()) << record.status();
  ExpectSame(*record, MakeRecord(81, 3));
  EXPECT_EQ(record->tokens(), 5);
  EXPECT_EQ(record->rounds(), 3);
  EXPECT_EQ(record->seconds().total, 2.0);
  EXPECT_EQ(record->seconds().device, 1.375);
  EXPECT_EQ(context.config.sampling_temperature, 0.1);
  EXPECT_EQ(context.config.target_model, "models/t");
  EXPECT_EQ(context.target_hash, "aa");
  EXPECT_EQ(context.draft_bytes, 77u);
}

TEST(RecordsTest, RefusesNumbersThatAreNotFinite) {
  for (double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    QuestionRecord record = MakeRecord(1);
    record.turns[1].seconds.verify = bad;
    EXPECT_THAT(RecordLine(record, MakeContext()).status().message(),
                HasSubstr("turns.1.seconds.verify"));
    EXPECT_FALSE(ParseRecordLine(R"({"schema": NaN})", nullptr).ok());
  }
}

TEST(RecordsTest, TextThatIsNotUtf8IsReplacedNotFatal) {
  QuestionRecord record = MakeRecord(1);
  record.turns[0].text = "a\xff";
  const auto line = RecordLine(record, MakeContext());
  ASSERT_TRUE(line.ok());
  EXPECT_EQ(json::parse(*line)["turns"][0]["text"], "a\xef\xbf\xbd");
}

TEST(RecordsTest, OtherSchemaAndMissingFieldsAreRefused) {
  json line = json::parse(*RecordLine(MakeRecord(1), MakeContext()));
  line["schema"] = kRecordSchema + 1;
  EXPECT_THAT(ParseRecordLine(line.dump(), nullptr).status().message(), HasSubstr("schema"));
  line["schema"] = kRecordSchema;
  line.erase("by_rank");
  EXPECT_THAT(ParseRecordLine(line.dump(), nullptr).status().message(), HasSubstr("by_rank"));
  EXPECT_FALSE(ParseRecordLine("", nullptr).ok());
  EXPECT_FALSE(ParseRecordLine("[]", nullptr).ok());
}

TEST(RecordsTest, FileIsAppendedAndReadBack) {
  const std::string folder = FreshFolder("append") + "/a/b";
  {
    auto file = RecordFile::Open(folder);
    ASSERT_TRUE(file.ok()) << file.status();
    ASSERT_TRUE(file->Append(MakeRecord(1), MakeContext()).ok());
    ASSERT_TRUE(file->Append(MakeRecord(2), MakeContext()).ok());
    ASSERT_TRUE(file->Append(MakeRecord(1, 1), MakeContext()).ok());
  }
  auto file = RecordFile::Open(folder);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->entries().size(), 3u);
  EXPECT_FALSE(file->repaired());
  ExpectSame(file->entries()[1].record, MakeRecord(2));
}

TEST(RecordsTest, ARecordCutShortAtAnyByteIsRemoved) {
  const std::string folder = FreshFolder("cut");
  std::string first;
  {
    auto file = RecordFile::Open(folder);
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE(file->Append(MakeRecord(1), MakeContext()).ok());
    first = Slurp(file->path());
    ASSERT_TRUE(file->Append(MakeRecord(2), MakeContext()).ok());
  }
  const std::string path = folder + "/records.jsonl";
  const std::string both = Slurp(path);
  for (size_t size : {first.size() + 1, first.size() + 200, both.size() - 1}) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << both.substr(0, size);
    auto file = RecordFile::Open(folder);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_TRUE(file->repaired());
    EXPECT_EQ(file->entries().size(), 1u);
    EXPECT_EQ(Slurp(path), first);
    // What is appended next begins a line of its own.
    ASSERT_TRUE(file->Append(MakeRecord(3), MakeContext()).ok());
    const std::string text = Slurp(path);
    EXPECT_TRUE(
        ParseRecordLine(std::string_view(text).substr(first.size(), text.size() - first.size() - 1),
                        nullptr)
            .ok());
  }
}

TEST(RecordsTest, ABrokenLineInTheMiddleIsNamed) {
  const std::string folder = FreshFolder("broken");
  std::filesystem::create_directories(folder);
  const std::string good = *RecordLine(MakeRecord(1), MakeContext());
  std::ofstream(folder + "/records.jsonl") << good << "\n{oops\n" << good << "\n";
  EXPECT_THAT(RecordFile::Open(folder).status().message(), HasSubstr("records.jsonl:2"));
}

TEST(RecordsTest, TheLaterOfTwoRecordsCounts) {
  const std::string folder = FreshFolder("twice");
  auto file = RecordFile::Open(folder);
  ASSERT_TRUE(file.ok());
  QuestionRecord failed = MakeRecord(1);
  failed.error = "question 1, turn 1: too long";
  failed.turns.clear();
  ASSERT_TRUE(file->Append(failed, MakeContext()).ok());
  ASSERT_TRUE(file->Append(MakeRecord(1), MakeContext()).ok());
  { RecordFile closed = *std::move(file); }
  auto again = RecordFile::Open(folder);
  ASSERT_TRUE(again.ok());
  ASSERT_EQ(again->entries().size(), 1u);
  EXPECT_TRUE(again->entries()[0].record.ok());
}

TEST(RecordsTest, OneProcessAtATime) {
  const std::string folder = FreshFolder("lock");
  auto file = RecordFile::Open(folder);
  ASSERT_TRUE(file.ok());
  EXPECT_THAT(RecordFile::Open(folder).status().message(), HasSubstr("in use by another run"));
  // A device would be read without end.
  const std::string device = FreshFolder("device");
  std::filesystem::create_directories(device);
  std::filesystem::create_symlink("/dev/full", device + "/records.jsonl");
  EXPECT_THAT(RecordFile::Open(device).status().message(), HasSubstr("not a regular file"));
}

TEST(RecordsTest, UnwritableFoldersAreNamed) {
  // Permissions do not bind root, so the folder's place is taken by a file.
  const std::string folder = FreshFolder("unwritable");
  std::ofstream(folder) << "a file";
  EXPECT_THAT(RecordFile::Open(folder + "/x").status().message(), HasSubstr(folder));
  EXPECT_FALSE(RecordFile::Open("/proc/no/such/place").ok());
  EXPECT_FALSE(WriteWhole(folder + "/x/file", "text").ok());
}

// A file-size limit gives the same short writes as a full disk.
class SizeLimit {
 public:
  explicit SizeLimit(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old_);
    rlimit limited = old_;
    limited.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &limited);
  }
  ~SizeLimit() { setrlimit(RLIMIT_FSIZE, &old_); }

 private:
  rlimit old_ = {};
};

TEST(RecordsTest, AFullDiskLeavesNothingHalfWritten) {
  const std::string folder = FreshFolder("full");
  auto file = RecordFile::Open(folder);
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(file->Append(MakeRecord(1), MakeContext()).ok());
  const std::string before = Slurp(file->path());
  {
    const SizeLimit limit(before.size() + 300);
    const absl::Status status = file->Append(MakeRecord(2), MakeContext());
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("records.jsonl"));
  }
  EXPECT_EQ(Slurp(file->path()), before);
  ASSERT_TRUE(file->Append(MakeRecord(2), MakeContext()).ok());
}

TEST(RecordsTest, WholeFilesAreOldOrNew) {
  const std::string folder = FreshFolder("whole");
  std::filesystem::create_directories(folder);
  const std::string path = folder + "/summary.csv";
  ASSERT_TRUE(WriteWhole(path, "old").ok());
  {
    const SizeLimit limit(1000);
    EXPECT_FALSE(WriteWhole(path, std::string(5000, 'x')).ok());
  }
  EXPECT_EQ(Slurp(path), "old");
  ASSERT_TRUE(WriteWhole(path, "new").ok());
  EXPECT_EQ(Slurp(path), "new");
  int files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++files;
  EXPECT_EQ(files, 1);
}

// What evaluation/speed.py and evaluation/equal.py of Spec-Bench read.
TEST(RecordsTest, SpecBenchAnswersHaveItsFields) {
  const QuestionRecord late = MakeRecord(90), early = MakeRecord(81);
  QuestionRecord failed = MakeRecord(85);
  failed.error = "x";
  const QuestionRecord* const records[] = {&late, &failed, &early};
  const auto text = SpecBenchAnswers(records, "m");
  ASSERT_TRUE(text.ok()) << text.status();
  std::istringstream lines(*text);
  std::string line;
  std::vector<json> answers;
  while (std::getline(lines, line)) answers.push_back(json::parse(line));
  ASSERT_EQ(answers.size(), 2u);
  EXPECT_EQ(answers[0]["question_id"], 81);
  EXPECT_EQ(answers[1]["question_id"], 90);
  const json& answer = answers[0];
  EXPECT_EQ(answer["category"], "writing");
  EXPECT_EQ(answer["model_id"], "m");
  EXPECT_TRUE(answer["answer_id"].is_string());
  EXPECT_TRUE(answer["tstamp"].is_number());
  ASSERT_EQ(answer["choices"].size(), 1u);
  const json& choice = answer["choices"][0];
  EXPECT_EQ(choice["index"], 0);
  EXPECT_EQ(choice["new_tokens"], json({4, 1}));
  EXPECT_EQ(choice["decoding_steps"], json({2, 1}));
  EXPECT_EQ(choice["wall_time"], json({1.0, 1.0}));
  EXPECT_EQ(choice["accept_lengths"], json({3, 1, 1}));
  EXPECT_EQ(choice["turns"].size(), 2u);
  EXPECT_NE(answers[0]["answer_id"], answers[1]["answer_id"]);
}

}  // namespace
}  // namespace canopy
