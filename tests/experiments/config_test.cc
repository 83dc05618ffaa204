#include "experiments/config.h"

#include <filesystem>
#include <fstream>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace canopy {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

absl::StatusOr<std::vector<ExperimentConfig>> Parse(std::string_view text,
                                                    std::vector<std::string> args = {}) {
  ConfigBuilder builder;
  if (absl::Status s = builder.AddFile(text, "x.cfg", "/exp"); !s.ok()) return s;
  if (absl::Status s = builder.AddArguments(args); !s.ok()) return s;
  return builder.Build();
}

std::string ErrorOf(std::string_view text, std::vector<std::string> args = {}) {
  const auto runs = Parse(text, std::move(args));
  return runs.ok() ? "no error" : Message(runs.status());
}

TEST(ConfigTest, DefaultsComeFromTheStruct) {
  const auto runs = Parse("# a question\n\n   \n");
  ASSERT_TRUE(runs.ok()) << runs.status();
  ASSERT_EQ(runs->size(), 1u);
  EXPECT_EQ(runs->front().suite_max_new_tokens, 1024);
  EXPECT_EQ(runs->front().rule(), "greedy");
}

TEST(ConfigTest, ReadsSectionsDotsAndComments) {
  const auto runs = Parse(
      "suite.limit = 7   # before any section the key has its own\r\n"
      "[tree]\n nodes=32# no blank needed\n shape = (((),()),())\n"
      "[sampling]\ntemperature = 0.5\nseed = 9007199254740991\n[run]\nbaseline = false\n");
  ASSERT_TRUE(runs.ok()) << runs.status();
  const ExperimentConfig& config = runs->front();
  EXPECT_EQ(config.suite_limit, 7);
  EXPECT_EQ(config.tree_nodes, 32);
  EXPECT_EQ(config.tree_shape, "(((),()),())");
  EXPECT_EQ(config.sampling_temperature, 0.5);
  EXPECT_EQ(config.sampling_seed, 9007199254740991);
  EXPECT_FALSE(config.run_baseline);
  EXPECT_EQ(config.rule(), "recursive");
}

TEST(ConfigTest, CommandLineTakesThePlaceOfTheFilesValues) {
  const auto runs = Parse("[tree]\nnodes = 8 | 16\n[suite]\ntemplate = vicuna\n",
                          {"--tree.nodes=32", "--suite.limit", "3", "--suite.template="});
  ASSERT_TRUE(runs.ok()) << runs.status();
  ASSERT_EQ(runs->size(), 1u);
  EXPECT_EQ(runs->front().tree_nodes, 32);
  EXPECT_EQ(runs->front().suite_limit, 3);
  EXPECT_EQ(runs->front().suite_template, "");
}

TEST(ConfigTest, SweepIsTheProductOfItsAxes) {
  const auto runs = Parse("[tree]\nshape = chain:4 | topk:4,2,1 | (())\nnodes = 8\nnodes = 16\n");
  ASSERT_TRUE(runs.ok()) << runs.status();
  std::vector<std::pair<std::string, int>> points;
  for (const ExperimentConfig& run : *runs) points.emplace_back(run.tree_shape, run.tree_nodes);
  EXPECT_THAT(points, ElementsAre(std::pair("chain:4", 8), std::pair("chain:4", 16),
                                  std::pair("topk:4,2,1", 8), std::pair("topk:4,2,1", 16),
                                  std::pair("(())", 8), std::pair("(())", 16)));
}

TEST(ConfigTest, AxesAreNamedInOrderOfDeclaration) {
  ConfigBuilder builder;
  ASSERT_TRUE(builder.AddFile("tree.nodes = 8 | 9\ndraft.kind = model | ngram\n", "f", "").ok());
  EXPECT_THAT(builder.Axes(), ElementsAre("draft.kind", "tree.nodes"));
}

TEST(ConfigTest, UnknownKeyNamesNearestKeyFileAndLine) {
  EXPECT_THAT(ErrorOf("# c\n[tree]\nnode = 3\n"),
              AllOf(HasSubstr("x.cfg:3"), HasSubstr("'tree.node'"), HasSubstr("'tree.nodes'")));
  EXPECT_THAT(ErrorOf("[sampling]\ntemprature = 3\n"), HasSubstr("'sampling.temperature'"));
  EXPECT_THAT(ErrorOf("", {"--suit.question=x"}),
              AllOf(HasSubstr("command line"), HasSubstr("'suite.questions'")));
  // The key's own name weighs more than its section.
  EXPECT_THAT(ErrorOf("nodes = 3\n"), HasSubstr("'tree.nodes'"));
  EXPECT_THAT(ErrorOf("[draft]\nmax_new_tokens = 3\n"), HasSubstr("'suite.max_new_tokens'"));
  // No abbreviation is taken for the key that it begins.
  EXPECT_THAT(ErrorOf("", {"--tree.nod=8"}), HasSubstr("unknown key 'tree.nod'"));
}

TEST(ConfigTest, OutOfRangeNamesKeyValueAndRange) {
  struct Case {
    const char* text;
    const char* value;
    const char* range;
  };
  for (const Case& c : {
           Case{"tree.nodes = 0\n", "tree.nodes = 0", "[1, 512]"},
           Case{"tree.nodes = 8 | 4096 | 16\n", "tree.nodes = 4096", "[1, 512]"},
           Case{"tree.nodes = many\n", "tree.nodes = many", "whole number"},
           Case{"tree.nodes = 8.5\n", "tree.nodes = 8.5", "whole number"},
           Case{"tree.nodes = 99999999999999999999\n", "tree.nodes = 9", "[1, 512]"},
           Case{"sampling.temperature = -1\n", "= -1", "[0, 100]"},
           Case{"sampling.temperature = nan\n", "= nan", "[0, 100]"},
           Case{"sampling.temperature = inf\n", "= inf", "[0, 100]"},
           Case{"sampling.top_p = 0\n", "= 0", "1]"},
           Case{"draft.method = best\n", "= best", "topk, sampled"},
           Case{"run.baseline = maybe\n", "= maybe", "true or false"},
           Case{"run.device = gpu\n", "= gpu", "cpu, cuda or cuda:N"},
           Case{"run.device = cuda:x\n", "= cuda:x", "cpu, cuda or cuda:N"},
           Case{"run.dtype = f64\n", "= f64", "auto, bf16, f32"},
           Case{"tree.shape = chain:x\n", "tree.shape = chain:x", ""},
       }) {
    EXPECT_THAT(ErrorOf(c.text),
                AllOf(HasSubstr("x.cfg:1"), HasSubstr(c.value), HasSubstr(c.range)))
        << c.text;
  }
}

TEST(ConfigTest, RefusesWhatIsNeitherKeyNorSection) {
  EXPECT_THAT(ErrorOf("[tree]\nnodes\n"), AllOf(HasSubstr("x.cfg:2"), HasSubstr("nodes")));
  EXPECT_THAT(ErrorOf("", {"nodes=3"}), HasSubstr("nodes=3"));
  EXPECT_THAT(ErrorOf("", {"-n", "3"}), HasSubstr("command line"));
}

TEST(ConfigTest, KeysWithOneValueRefuseASecond) {
  EXPECT_THAT(ErrorOf("run.name = a\nrun.name = b\n"),
              AllOf(HasSubstr("x.cfg:2"), HasSubstr("run.name"), HasSubstr("x.cfg:1")));
  EXPECT_THAT(ErrorOf("tree.nodes = 8 | 8\n"), HasSubstr("stands twice"));
  EXPECT_THAT(ErrorOf("tree.nodes = 8 |  | 9\n"), HasSubstr("tree.nodes"));
}

TEST(ConfigTest, SweepsHaveALimit) {
  std::string text;
  for (int i = 1; i <= 100; ++i) text += "sampling.seed = " + std::to_string(i) + "\n";
  for (int i = 1; i <= 100; ++i) text += "tree.nodes = " + std::to_string(i) + "\n";
  EXPECT_THAT(ErrorOf(text), HasSubstr("4096 runs"));
}

TEST(ConfigTest, PathsAreRelativeToTheFileAndOnTheCommandLineToTheFolder) {
  const auto runs = Parse("[target]\nmodel = ../m/a | /abs/b\n", {"--draft.model=d/e"});
  ASSERT_TRUE(runs.ok()) << runs.status();
  ASSERT_EQ(runs->size(), 2u);
  EXPECT_EQ((*runs)[0].target_model, "/m/a");
  EXPECT_EQ((*runs)[1].target_model, "/abs/b");
  EXPECT_EQ((*runs)[0].draft_model, "d/e");
  EXPECT_EQ((*runs)[0].run_results, "results");
}

TEST(ConfigTest, ValueTextIsReadBackAsItWas) {
  ExperimentConfig config;
  config.sampling_temperature = 0.1;
  config.sampling_top_p = 1.0 / 3.0;
  config.sampling_seed = 123456789012345;
  config.tree_shape = "topk:2,2";
  config.run_baseline = false;
  std::string text;
  for (const ConfigKey& key : ConfigKeys()) {
    text += std::string(key.name) + " = " + ValueText(key, config) + "\n";
  }
  ConfigBuilder builder;
  ASSERT_TRUE(builder.AddFile(text, "x", "").ok());
  const auto runs = builder.Build();
  ASSERT_TRUE(runs.ok()) << runs.status();
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.path) continue;
    EXPECT_EQ(ValueText(key, runs->front()), ValueText(key, config)) << key.name;
  }
  EXPECT_EQ(runs->front().sampling_top_p, 1.0 / 3.0);
}

TEST(ConfigTest, HashesTellMethodsApartAndShareTheirBaseline) {
  ExperimentConfig a;
  a.target_model = "t";
  ExperimentConfig b = a;
  b.tree_shape = "chain:2";
  EXPECT_NE(ConfigHash(a, false), ConfigHash(b, false));
  EXPECT_EQ(ConfigHash(a, true), ConfigHash(b, true));
  b = a;
  b.sampling_seed = 1;
  EXPECT_NE(ConfigHash(a, true), ConfigHash(b, true));
  b = a;
  b.suite_limit = 5;
  b.run_repetitions = 3;
  b.acceptance_rule = "greedy";  // what auto stands for at temperature 0
  EXPECT_EQ(ConfigHash(a, false), ConfigHash(b, false));
}

TEST(ConfigTest, ChecksKeysAgainstEachOther) {
  ExperimentConfig good;
  good.target_model = "t";
  good.draft_model = "d";
  good.suite_questions = "q";
  good.run_name = "n";
  EXPECT_TRUE(CheckConfig(good).ok()) << CheckConfig(good);
  const auto error = [&](auto change) {
    ExperimentConfig config = good;
    change(config);
    return Message(CheckConfig(config));
  };
  EXPECT_THAT(error([](auto& c) { c.target_model = ""; }), HasSubstr("target.model"));
  EXPECT_THAT(error([](auto& c) { c.draft_model = ""; }), HasSubstr("draft.model"));
  EXPECT_THAT(error([](auto& c) { c.suite_questions = ""; }), HasSubstr("suite.questions"));
  EXPECT_THAT(error([](auto& c) {
                c.tree_shape = "topk:4,4";
                c.tree_nodes = 20;
              }),
              AllOf(HasSubstr("21"), HasSubstr("tree.nodes = 20")));
  EXPECT_EQ(error([](auto& c) {
              c.tree_shape = "topk:4,4";
              c.tree_nodes = 21;
            }),
            "");
  EXPECT_THAT(error([](auto& c) { c.tree_shape = "chain:32"; }), HasSubstr("31"));
  EXPECT_EQ(error([](auto& c) { c.tree_shape = "chain:31"; }), "");
  EXPECT_THAT(error([](auto& c) {
                c.acceptance_rule = "greedy";
                c.sampling_temperature = 1;
              }),
              HasSubstr("greedy"));
  EXPECT_THAT(error([](auto& c) { c.draft_ngram_min = 9; }), HasSubstr("ngram"));
  EXPECT_THAT(error([](auto& c) { c.run_name = "../x"; }), HasSubstr("run.name"));
}

TEST(ConfigTest, EveryKeyIsDeclaredWithHelpAndADefaultInRange) {
  std::set<std::string> names;
  const ExperimentConfig defaults;
  for (const ConfigKey& key : ConfigKeys()) {
    EXPECT_TRUE(names.insert(key.name).second) << key.name;
    EXPECT_GT(std::string(key.help).size(), 3u) << key.name;
    ConfigBuilder builder;
    const std::string line = std::string(key.name) + " = " + ValueText(key, defaults);
    ASSERT_TRUE(builder.AddFile(line, "x", "").ok()) << line;
    EXPECT_TRUE(builder.Build().ok()) << line << builder.Build().status();
  }
}

TEST(ConfigTest, LoadsAFileAndNamesTheRunAfterIt) {
  const std::filesystem::path folder =
      std::filesystem::path(::testing::TempDir()) / "canopy_config_test";
  std::filesystem::create_directories(folder);
  const std::string file = (folder / "trees.cfg").string();
  std::ofstream(file) << "[target]\nmodel = m\n[draft]\nkind = none\n[suite]\nquestions = q\n";
  const auto parsed = LoadConfig(file, {});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->runs.front().run_name, "trees");
  EXPECT_EQ(parsed->runs.front().target_model, (folder / "m").string());
  EXPECT_FALSE(LoadConfig((folder / "absent.cfg").string(), {}).ok());
  EXPECT_FALSE(LoadConfig(folder.string(), {}).ok());
}

}  // namespace
}  // namespace canopy
