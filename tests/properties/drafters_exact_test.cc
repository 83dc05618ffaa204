// Whatever drafts, the text is the target's: greedy ids equal plain decoding's for every drafter
// and tree, and with Gumbel coupling at temperature 1 so do sampled ids.

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "core/chat_template.h"
#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "core/tokenizer.h"
#include "drafting/registry.h"
#include "experiments/decode_loop.h"
#include "experiments/suite.h"
#include "gtest/gtest.h"
#include "models/loader.h"
#include "verify/acceptance.h"

namespace canopy {
namespace {

// Sanitizers slow a pass down some tenfold, so fewer questions are asked under them: too few for a
// drafter to be sure of an accepted token.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kAllQuestions = false;
constexpr int kEvery = 12;
constexpr int kNewTokens = 16;
#else
constexpr bool kAllQuestions = true;
constexpr int kEvery = 1;
constexpr int kNewTokens = 32;
#endif

struct Case {
  std::string name;
  std::string target;
  std::string draft;
  std::string questions;
  int step;  // every step-th question
};

struct Method {
  std::string kind;
  std::string shape;
  std::string draw = "topk";
};

class DraftersExact : public ::testing::TestWithParam<Case> {
 protected:
  static std::string Path(const std::string& path) {
    return std::string(CANOPY_SOURCE_DIR) + "/" + path;
  }

  void SetUp() override {
    const Case& c = GetParam();
    for (const std::string& path : {c.target, c.draft, c.questions}) {
      if (!std::filesystem::exists(Path(path))) {
        GTEST_SKIP() << "skipped: " << path << " is not there; it is not part of the repository";
      }
    }
    cpu_ = *CpuBackend::Create(0);
    auto target = LoadModel(*cpu_, Path(c.target));
    auto draft = LoadModel(*cpu_, Path(c.draft));
    auto tokenizer = Tokenizer::Load(Path(c.target));
    auto chat = ChatTemplate::Load(Path(c.target), "");
    auto questions = LoadQuestions(Path(c.questions));
    ASSERT_TRUE(target.ok() && draft.ok() && tokenizer.ok() && chat.ok() && questions.ok())
        << target.status() << draft.status() << tokenizer.status() << chat.status()
        << questions.status();
    target_ = *std::move(target);
    draft_ = *std::move(draft);
    loop_ = *DecodeLoop::Create(*target_, 64);
    for (size_t i = 0; i < questions->size(); i += c.step * kEvery) {
      const ChatMessage message{"user", (*questions)[i].turns[0]};
      auto text = chat->Render({&message, 1}, true);
      ASSERT_TRUE(text.ok()) << text.status();
      prompts_.push_back(tokenizer->Encode(*text, false));
    }
  }

  std::vector<std::vector<TokenId>> Generate(const Method& method, const std::string& rule_name,
                                             double temperature, int64_t* rounds) {
    DrafterOptions options;
    options.model = draft_.get();
    options.shape = method.shape;
    options.method = method.draw;
    options.vocab_size = target_->info().vocab_size;
    auto drafter = MakeDrafter(method.kind, options);
    auto rule = MakeAcceptanceRule(rule_name);
    EXPECT_TRUE(drafter.ok() && rule.ok()) << drafter.status() << rule.status();
    auto state = (*drafter)->NewState();
    EXPECT_TRUE(state.ok()) << state.status();
    std::vector<std::vector<TokenId>> texts;
    Generation generation;
    for (size_t i = 0; i < prompts_.size(); ++i) {
      DecodeRequest request;
      request.prompt = prompts_[i];
      request.drafter = drafter->get();
      request.draft_state = state->get();
      request.rule = rule->get();
      request.sampling.temperature = temperature;
      request.noise = NoiseStream(7, i);
      request.max_new_tokens = kNewTokens;
      const absl::Status status = loop_->Decode({&request, 1}, {&generation, 1});
      EXPECT_TRUE(status.ok()) << status;
      texts.push_back(generation.tokens);
      *rounds += static_cast<int64_t>(generation.accept_lengths.size());
    }
    return texts;
  }

  // Every method's text equals that of plain decoding, and of all questions some draft is accepted.
  void ExpectSameText(const std::string& rule, double temperature) {
    int64_t plain_rounds = 0;
    const auto expected = Generate({"none", "chain:1"}, rule, temperature, &plain_rounds);
    const std::vector<Method> methods = {
        {"model", "chain:4"},
        {"model", "topk:4,2,2,1"},
        {"model", "((((),()),()),((),()),())"},
        {"model", "topk:3,2,1", "sampled"},
        {"ngram", "chain:10"},
        {"ngram", "topk:3,1,1,1"},
    };
    for (const Method& method : methods) {
      int64_t rounds = 0;
      const auto got = Generate(method, rule, temperature, &rounds);
      ASSERT_EQ(got.size(), expected.size());
      for (size_t i = 0; i < got.size(); ++i) {
        const auto differs =
            std::mismatch(got[i].begin(), got[i].end(), expected[i].begin(), expected[i].end());
        EXPECT_TRUE(got[i] == expected[i])
            << method.kind << " " << method.shape << " " << method.draw << ": question " << i
            << " from token " << differs.first - got[i].begin() << " of " << expected[i].size()
            << " behind a prompt of " << prompts_[i].size();
      }
      if (kAllQuestions) {
        EXPECT_LT(rounds, plain_rounds)
            << method.kind << " " << method.shape << ": nothing was accepted";
      }
    }
  }

  std::unique_ptr<CpuBackend> cpu_;
  std::unique_ptr<LanguageModel> target_;
  std::unique_ptr<LanguageModel> draft_;
  std::unique_ptr<DecodeLoop> loop_;
  std::vector<std::vector<TokenId>> prompts_;
};

TEST_P(DraftersExact, GreedyIdsEqualPlainDecoding) { ExpectSameText("greedy", 0.0); }

TEST_P(DraftersExact, GumbelCoupledTextDoesNotDependOnTheDrafter) { ExpectSameText("gumbel", 1.0); }

constexpr char kSpecBench[] = "../shared/data/specbench/question.jsonl";

// 480 questions, every tenth of them.
INSTANTIATE_TEST_SUITE_P(Pairs, DraftersExact,
                         ::testing::Values(Case{"bundled", "data/models/tiny-bamba-4m",
                                                "data/models/tiny-draft-m2",
                                                "data/questions/grade_school.jsonl", 1},
                                           Case{"m2_16m", "../shared/models/m2-16m",
                                                "../shared/models/draft-m2-2m", kSpecBench, 10},
                                           Case{"bamba_16m", "../shared/models/bamba-16m",
                                                "../shared/models/draft-m2-2m", kSpecBench, 10},
                                           Case{"llama_16m", "../shared/models/llama-16m",
                                                "../shared/models/draft-llama-2m", kSpecBench, 10}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace canopy
