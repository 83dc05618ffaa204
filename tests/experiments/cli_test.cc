// The program itself, run as a user runs it: exit codes, messages, results, interruption.

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "experiments/config.h"
#include "experiments/records.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

extern char** environ;

namespace canopy {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
namespace fs = std::filesystem;

const std::string kSource = CANOPY_SOURCE_DIR;
const std::string kTarget = kSource + "/data/models/tiny-bamba-4m";
const std::string kDraft = kSource + "/data/models/tiny-draft-m2";
const std::string kQuestions = kSource + "/data/questions/grade_school.jsonl";

std::string Slurp(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  text << stream.rdbuf();
  return text.str();
}

void Spit(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
}

struct Result {
  int code = -1;  // 128 + signal if one ended it
  std::string out;
  std::string err;
};

class CliTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(::testing::TempDir()) /
              (std::string("canopy_cli_") +
               ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string Path(const std::string& name) const { return (folder_ / name).string(); }

  pid_t Start(std::vector<std::string> args, const std::string& program = CANOPY_BINARY) {
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    const int flags = O_WRONLY | O_CREAT | O_TRUNC;
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, Path("out").c_str(), flags, 0644);
    posix_spawn_file_actions_addopen(&actions, 2, Path("err").c_str(), flags, 0644);
    args.insert(args.begin(), program);
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    pid_t pid = -1;
    EXPECT_EQ(posix_spawn(&pid, program.c_str(), &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    return pid;
  }

  Result Wait(pid_t pid) {
    int status = 0;
    EXPECT_EQ(waitpid(pid, &status, 0), pid);
    Result result;
    result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    result.out = Slurp(Path("out"));
    result.err = Slurp(Path("err"));
    return result;
  }

  Result Canopy(std::vector<std::string> args) { return Wait(Start(std::move(args))); }

  // A config of a small run on the bundled pair, results in the test's folder.
  std::string Config(const std::string& more = "") {
    const std::string file = Path("small.cfg");
    Spit(file, "[target]\nmodel = " + kTarget + "\n[draft]\nmodel = " + kDraft +
                   "\n[tree]\nshape = topk:2,1,1\n[suite]\nquestions = " + kQuestions +
                   "\nlimit = 3\nmax_new_tokens = 20\n[run]\nresults = results\nwarmup = "
                   "0\nthreads = 1\n" +
                   more);
    return file;
  }

  std::vector<QuestionRecord> Records(const std::string& name = "small") {
    std::vector<QuestionRecord> records;
    std::istringstream lines(Slurp(Path("results/" + name + "/records.jsonl")));
    for (std::string line; std::getline(lines, line);) {
      auto record = ParseRecordLine(line, nullptr);
      EXPECT_TRUE(record.ok()) << record.status();
      if (record.ok()) records.push_back(*std::move(record));
    }
    return records;
  }

  fs::path folder_;
};

int Lines(const std::string& text) {
  return static_cast<int>(std::count(text.begin(), text.end(), '\n'));
}

// One line on stderr that begins with the program's name.
void ExpectOneLineError(const Result& result, int code) {
  EXPECT_EQ(result.code, code) << result.err;
  EXPECT_EQ(Lines(result.err), 1) << result.err;
  EXPECT_THAT(result.err, ::testing::StartsWith("canopy"));
}

TEST_F(CliTest, UsageErrorsExitWithTwo) {
  EXPECT_EQ(Canopy({}).code, 2);
  ExpectOneLineError(Canopy({"frobnicate"}), 2);
  ExpectOneLineError(Canopy({"run"}), 2);
  ExpectOneLineError(Canopy({"run", "a.cfg", "b.cfg"}), 2);
  ExpectOneLineError(Canopy({"run", "-x"}), 2);
  ExpectOneLineError(Canopy({"list", "x"}), 2);
  ExpectOneLineError(Canopy({"generate"}), 2);
  ExpectOneLineError(Canopy({"generate", "--target", kTarget}), 2);
  ExpectOneLineError(Canopy({"generate", "--target", kTarget, "--prompt"}), 2);
  ExpectOneLineError(Canopy({"generate", "--target", kTarget, "--prompt", "x", "--colour", "1"}),
                     2);
}

TEST_F(CliTest, HelpAndVersion) {
  const Result help = Canopy({"help"});
  EXPECT_EQ(help.code, 0);
  for (const char* command : {"run", "generate", "inspect", "list", "golden"}) {
    EXPECT_THAT(help.out, HasSubstr(std::string("canopy ") + command));
  }
  EXPECT_EQ(Canopy({"run", "--help"}).code, 0);
  EXPECT_EQ(Canopy({"generate", "--help"}).code, 0);
  const Result version = Canopy({"--version"});
  EXPECT_EQ(version.code, 0);
  EXPECT_THAT(version.out, ::testing::StartsWith("canopy "));
}

TEST_F(CliTest, ListShowsEveryKey) {
  const Result list = Canopy({"list"});
  EXPECT_EQ(list.code, 0);
  for (const ConfigKey& key : ConfigKeys()) EXPECT_THAT(list.out, HasSubstr(key.name));
  for (const char* name : {"mamba2", "bamba", "ngram", "recursive", "gumbel", "vicuna"}) {
    EXPECT_THAT(list.out, HasSubstr(name));
  }
}

TEST_F(CliTest, BadConfigsAreOneLine) {
  ExpectOneLineError(Canopy({"run", Path("absent.cfg")}), 1);
  const Result unknown = Canopy({"run", Config(), "--tree.shap=chain:2"});
  ExpectOneLineError(unknown, 1);
  EXPECT_THAT(unknown.err, HasSubstr("did you mean 'tree.shape'"));
  const Result range = Canopy({"run", Config("[tree]\nnodes = 8 | 100000\n")});
  ExpectOneLineError(range, 1);
  EXPECT_THAT(range.err,
              AllOf(HasSubstr("small.cfg:16"), HasSubstr("100000"), HasSubstr("[1, 512]")));
  const Result absent = Canopy({"run", Config(), "--target.model=/no/such/model"});
  ExpectOneLineError(absent, 1);
  EXPECT_THAT(absent.err, AllOf(HasSubstr("target.model"), HasSubstr("/no/such/model")));
  EXPECT_FALSE(fs::exists(Path("results")));
}

TEST_F(CliTest, BrokenQuestionFilesNameTheLine) {
  Spit(Path("q.jsonl"), Slurp(kQuestions) + "{\"question_id\": 1000,\n");
  const Result broken = Canopy({"run", Config(), "--suite.questions=" + Path("q.jsonl")});
  ExpectOneLineError(broken, 1);
  EXPECT_THAT(broken.err, HasSubstr("q.jsonl:25"));
  EXPECT_FALSE(fs::exists(Path("results")));
}

TEST_F(CliTest, DryRunsOfAllConfigsPass) {
  int configs = 0;
  for (const auto& entry : fs::directory_iterator(kSource + "/configs")) {
    if (entry.path().extension() != ".cfg") continue;
    ++configs;
    const Result result = Canopy({"run", "--dry-run", entry.path().string()});
    EXPECT_EQ(result.code, 0) << entry.path() << result.err;
    EXPECT_THAT(result.out, AllOf(HasSubstr("[tree]"), HasSubstr("run 1:")));
  }
  EXPECT_GT(configs, 0);
}

TEST_F(CliTest, DryRunNotesMissingModelsAndWritesNothing) {
  const Result result = Canopy({"run", Config(), "--dry-run", "--target.model=/no/such/model"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("note: target.model = /no/such/model"), HasSubstr("no checkpoint")));
  EXPECT_FALSE(fs::exists(Path("results")));
}

// What dry-run prints is itself a config of the same experiment.
TEST_F(CliTest, EffectiveConfigIsReadBack) {
  const Result first = Canopy({"run", Config("[tree]\nnodes = 8 | 16\n"), "--dry-run"});
  ASSERT_EQ(first.code, 0) << first.err;
  Spit(Path("again.cfg"), first.out.substr(0, first.out.find("\n3 of 24")));
  const Result again = Canopy({"run", Path("again.cfg"), "--dry-run"});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_EQ(first.out, again.out);
}

TEST_F(CliTest, RunWritesTablesRecordsAndAnswers) {
  const Result result = Canopy({"run", Config()});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("overall"), HasSubstr("speed-up"), HasSubstr("MAT"),
                                HasSubstr("token ids equal plain decoding's in all 3 answers"),
                                HasSubstr("by depth"), HasSubstr("outside model passes")));
  const std::vector<QuestionRecord> records = Records();
  ASSERT_EQ(records.size(), 6u);
  std::map<int64_t, std::vector<int32_t>> tokens;
  for (const QuestionRecord& record : records) {
    for (const TurnRecord& turn : record.turns) {
      int64_t sum = 0;
      for (int32_t length : turn.accept_lengths) sum += length;
      EXPECT_EQ(sum, static_cast<int64_t>(turn.tokens.size()));
      EXPECT_LE(turn.tokens.size(), 20u);
    }
    auto& first = tokens[record.question_id];
    if (first.empty()) first = record.turns[0].tokens;
    EXPECT_EQ(first, record.turns[0].tokens);
  }
  int answer_files = 0;
  for (const auto& entry : fs::directory_iterator(Path("results/small/answers/run_1"))) {
    ++answer_files;
    EXPECT_EQ(Lines(Slurp(entry.path().string())), 3);
  }
  EXPECT_EQ(answer_files, 2);
  EXPECT_THAT(Slurp(Path("results/small/summary.csv")), HasSubstr("overall"));
  EXPECT_THAT(Slurp(Path("results/small/effective.cfg")), HasSubstr("topk:2,1,1"));

  // The same again runs nothing and shows the same table.
  const Result again = Canopy({"run", Config()});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_THAT(again.err, HasSubstr("nothing is run"));
  EXPECT_EQ(Records().size(), 6u);

  // More questions and repetitions of the same experiment are added to it.
  const Result more = Canopy({"run", Config(), "--suite.limit=4", "--run.repetitions=2"});
  EXPECT_EQ(more.code, 0) << more.err;
  EXPECT_THAT(more.err, HasSubstr("6 of 16 answers are there already"));
  EXPECT_EQ(Records().size(), 16u);

  // Another experiment is not.
  const Result other = Canopy({"run", Config(), "--tree.shape=chain:1"});
  ExpectOneLineError(other, 1);
  EXPECT_THAT(other.err, AllOf(HasSubstr("tree.shape = topk:2,1,1"), HasSubstr("--run.name")));
  EXPECT_EQ(Records().size(), 16u);
}

TEST_F(CliTest, SweepsShareOneBaseline) {
  const Result result = Canopy({"run", Config(), "--suite.limit=2", "--tree.shape=chain:2 | topk:2",
                                "--draft.kind=model | ngram"});
  ASSERT_EQ(result.code, 0) << result.err;
  std::map<std::string, int> by_arm;
  for (const QuestionRecord& record : Records()) ++by_arm[record.arm];
  EXPECT_EQ(by_arm.size(), 5u);
  for (const auto& [arm, count] : by_arm) EXPECT_EQ(count, 2) << arm;
  EXPECT_THAT(result.out, HasSubstr("All runs"));
}

TEST_F(CliTest, GumbelTextIsTheSameForEveryDrafter) {
  const Result result =
      Canopy({"run", Config(), "--acceptance.rule=gumbel", "--sampling.temperature=1",
              "--draft.kind=model | ngram", "--tree.shape=chain:3 | topk:3,2"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("equal plain decoding's in all 3"));
  EXPECT_THAT(result.out, Not(HasSubstr("NOT EQUAL")));
}

TEST_F(CliTest, SampledRunsShowThatTextsDiffer) {
  const Result result = Canopy({"run", Config(), "--sampling.temperature=0.8",
                                "--draft.method=sampled", "--run.repetitions=2"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("sampled"), HasSubstr("±")));
  // Repetitions measure time: the text of a seed is one.
  std::map<std::pair<std::string, int64_t>, std::set<std::vector<int32_t>>> texts;
  for (const QuestionRecord& record : Records()) {
    texts[{record.run, record.question_id}].insert(record.turns[0].tokens);
  }
  for (const auto& [key, set] : texts) EXPECT_EQ(set.size(), 1u);
}

TEST_F(CliTest, ADraftWithAnotherVocabularyIsRefused) {
  fs::copy(kDraft, Path("draft"), fs::copy_options::recursive);
  json tokenizer = json::parse(Slurp(Path("draft/tokenizer.json")));
  json& vocab = tokenizer["model"]["vocab"];
  std::string a, b;
  for (const auto& [token, id] : vocab.items()) {
    if (id == 1000) a = token;
    if (id == 1001) b = token;
  }
  std::swap(vocab[a], vocab[b]);
  Spit(Path("draft/tokenizer.json"), tokenizer.dump());
  const Result result = Canopy({"run", Config(), "--draft.model=" + Path("draft")});
  ExpectOneLineError(result, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("1000"), HasSubstr(Path("draft")), HasSubstr(kTarget)));
}

TEST_F(CliTest, APromptThatIsTooLongFailsAloneAndIsNamed) {
  fs::copy(kTarget, Path("target"), fs::copy_options::recursive);
  json config = json::parse(Slurp(Path("target/config.json")));
  config["max_position_embeddings"] = 100;
  Spit(Path("target/config.json"), config.dump());
  std::string words;
  for (int i = 0; i < 150; ++i) words += " apple";
  Spit(Path("q.jsonl"),
       "{\"question_id\": 5, \"category\": \"qa\", \"turns\": [\"How many apples?\"]}\n"
       "{\"question_id\": 6, \"category\": \"qa\", \"turns\": [\"How many" +
           words + "?\"]}\n");
  const Result result = Canopy({"run", Config(), "--target.model=" + Path("target"),
                                "--suite.questions=" + Path("q.jsonl")});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("question 6, turn 1"), HasSubstr("positions for 100")));
  EXPECT_THAT(result.out, AllOf(HasSubstr("failed"), HasSubstr("equal plain decoding's in all 1")));
  const std::vector<QuestionRecord> records = Records();
  ASSERT_EQ(records.size(), 4u);
  for (const QuestionRecord& record : records) EXPECT_EQ(record.ok(), record.question_id == 5);
  // Tried again, it still counts once.
  EXPECT_EQ(Canopy({"run", Config(), "--target.model=" + Path("target"),
                    "--suite.questions=" + Path("q.jsonl")})
                .code,
            1);
  EXPECT_THAT(Slurp(Path("results/small/summary.csv")), HasSubstr("overall,1,1,"));
}

TEST_F(CliTest, UnwritableResultsAreNamed) {
  Spit(Path("results"), "a file, not a folder");
  const Result result = Canopy({"run", Config()});
  ExpectOneLineError(result, 1);
  EXPECT_THAT(result.err, HasSubstr("results"));
}

TEST_F(CliTest, AFullDiskEndsTheRunWithWholeRecords) {
  // The shell's limit is in blocks of 512 or 1024 bytes: a few records fit.
  const std::string command =
      std::string("ulimit -f 12; exec ") + CANOPY_BINARY + " run " + Config();
  const Result result = Wait(Start({"-c", command}, "/bin/sh"));
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr("canopy run: cannot write"), HasSubstr("records.jsonl")));
  const size_t whole = Records().size();  // each line is checked
  EXPECT_GT(whole, 0u);
  EXPECT_LT(whole, 6u);
  EXPECT_EQ(Slurp(Path("results/small/records.jsonl")).back(), '\n');
  // With room it goes on.
  EXPECT_EQ(Canopy({"run", Config()}).code, 0);
  EXPECT_EQ(Records().size(), 6u);
}

using Key = std::tuple<std::string, int64_t, int>;
std::map<Key, std::vector<std::vector<int32_t>>> TokensByKey(
    const std::vector<QuestionRecord>& records) {
  std::map<Key, std::vector<std::vector<int32_t>>> map;
  for (const QuestionRecord& record : records) {
    auto& turns = map[{record.run, record.question_id, record.repetition}];
    EXPECT_TRUE(turns.empty()) << "counted twice: " << record.question_id;
    for (const TurnRecord& turn : record.turns) turns.push_back(turn.tokens);
  }
  return map;
}

TEST_F(CliTest, InterruptedRunsGoOnWhereTheyStopped) {
  const std::vector<std::string> run = {"run", Config(), "--suite.limit=8",
                                        "--suite.max_new_tokens=64", "--run.repetitions=3"};
  const std::string records = Path("results/small/records.jsonl");
  std::vector<std::string> whole = run;
  whole.push_back("--run.name=whole");
  ASSERT_EQ(Canopy(whole).code, 0);

  // Once by Ctrl-C, once by SIGTERM, once killed; each when some more records are there.
  int wanted = 3;
  for (int signal : {SIGINT, SIGTERM, SIGKILL}) {
    const pid_t pid = Start(run);
    for (int i = 0; i < 6000 && Lines(Slurp(records)) < wanted; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    kill(pid, signal);
    const Result result = Wait(pid);
    if (signal == SIGKILL) {
      EXPECT_EQ(result.code, 128 + SIGKILL);
      // What a crash in mid-write would leave.
      std::ofstream(records, std::ios::app) << "{\"schema\":1,\"run\":\"0123";
    } else {
      EXPECT_EQ(result.code, 1);
      EXPECT_THAT(result.err, HasSubstr("start the same command again"));
    }
    const int there = Lines(Slurp(records));
    EXPECT_GE(there, wanted);
    EXPECT_LT(there, 48);
    wanted = there + 3;
  }
  const Result rest = Canopy(run);
  EXPECT_EQ(rest.code, 0) << rest.err;
  EXPECT_THAT(rest.err, AllOf(HasSubstr("cut short"), HasSubstr("there already")));
  const auto expected = TokensByKey(Records("whole"));
  EXPECT_EQ(expected.size(), 48u);
  EXPECT_EQ(TokensByKey(Records()), expected);
}

TEST_F(CliTest, GenerateIsTheSameWithAndWithoutADraft) {
  const std::vector<std::string> plain = {"generate",
                                          "--target",
                                          kTarget,
                                          "--prompt",
                                          "Tom has 3 apples. How many are left?",
                                          "--max-new-tokens",
                                          "40",
                                          "--threads",
                                          "1"};
  const Result without = Canopy(plain);
  ASSERT_EQ(without.code, 0) << without.err;
  EXPECT_GT(without.out.size(), 5u);
  EXPECT_THAT(without.out, Not(HasSubstr("\033")));  // no colours into a file
  std::vector<std::string> drafted = plain;
  drafted.insert(drafted.end(), {"--draft", kDraft, "--tree=topk:3,2", "--stats"});
  const Result with = Canopy(drafted);
  ASSERT_EQ(with.code, 0) << with.err;
  EXPECT_EQ(with.out, without.out);
  EXPECT_THAT(with.err, AllOf(HasSubstr("MAT"), HasSubstr("depth 1: accepted")));
  std::vector<std::string> lookup = plain;
  lookup.insert(lookup.end(), {"--drafter", "ngram"});
  EXPECT_EQ(Canopy(lookup).out, without.out);
  std::vector<std::string> raw = plain;
  raw.push_back("--raw");
  const Result without_template = Canopy(raw);
  EXPECT_EQ(without_template.code, 0) << without_template.err;
  EXPECT_NE(without_template.out, without.out);
  std::vector<std::string> bad = plain;
  bad.insert(bad.end(), {"--temperature", "-1"});
  ExpectOneLineError(Canopy(bad), 1);
}

}  // namespace
}  // namespace canopy
