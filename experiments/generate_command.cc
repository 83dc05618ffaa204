#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "experiments/arm.h"
#include "experiments/commands.h"
#include "experiments/config.h"
#include "experiments/signals.h"

namespace canopy {
namespace {

// Room for a template's own tokens; a longer one costs a second allocation.
constexpr int kTemplateSlack = 256;

struct Flag {
  const char* name;
  const char* key;  // of the config, which has its range and default
  const char* help;
};

constexpr Flag kFlags[] = {
    {"--target", "--target.model", "folder of the target's checkpoint"},
    {"--draft", "--draft.model", "folder of a draft model; without it, plain decoding"},
    {"--drafter", "--draft.kind", "another drafter than a model, for example ngram"},
    {"--method", "--draft.method", "how a draft model chooses siblings"},
    {"--tree", "--tree.shape", "draft tree, for example chain:4 or topk:4,2,1"},
    {"--rule", "--acceptance.rule", "acceptance rule"},
    {"--max-new-tokens", "--suite.max_new_tokens", "most tokens of the answer"},
    {"--temperature", "--sampling.temperature", "0: greedy"},
    {"--top-k", "--sampling.top_k", "0: all"},
    {"--top-p", "--sampling.top_p", "1: all"},
    {"--seed", "--sampling.seed", "of all random numbers"},
    {"--template", "--suite.template", "built-in chat template instead of the model's own"},
    {"--threads", "--run.threads", "0: one for each core"},
};

void PrintUsage() {
  std::printf(
      "usage: canopy generate --target DIR [--draft DIR] --prompt TEXT [FLAG VALUE ...]\n\n"
      "Streams the answer to one prompt. On a terminal, tokens that were drafted and accepted are\n"
      "green, the target's own are not.\n\n");
  for (const Flag& flag : kFlags) std::printf("  %-17s %s\n", flag.name, flag.help);
  std::printf("  %-17s %s\n", "--raw", "the prompt as it is, without a chat template");
  std::printf("  %-17s %s\n", "--stats", "print rates and acceptance afterwards, on stderr");
}

// Prints tokens as they come.
class StreamingSink : public TokenSink {
 public:
  StreamingSink(const Tokenizer& tokenizer, bool colour)
      : decoder_(tokenizer, /*skip_special_tokens=*/true), colour_(colour) {}

  void OnTokens(std::span<const TokenId> tokens, int drafted) override {
    for (size_t i = 0; i < tokens.size(); ++i) {
      Print(decoder_.Push(tokens[i]), static_cast<int>(i) < drafted);
    }
    std::fflush(stdout);
  }
  void Finish() {
    Print(decoder_.Finish(), false);
    std::fputc('\n', stdout);
    std::fflush(stdout);
  }

 private:
  void Print(const std::string& text, bool drafted) {
    if (text.empty()) return;
    if (drafted && colour_) {
      std::printf("\033[32m%s\033[0m", text.c_str());
    } else {
      std::fwrite(text.data(), 1, text.size(), stdout);
    }
  }

  StreamDecoder decoder_;
  bool colour_;
};

void PrintStats(const Generation& generation, int prompt_tokens) {
  const double tokens = static_cast<double>(generation.tokens.size());
  const double rounds = static_cast<double>(generation.accept_lengths.size());
  const PhaseSeconds& s = generation.seconds;
  std::fprintf(
      stderr,
      "\nprompt %d tokens, answer %.0f tokens in %.0f rounds (MAT %.2f), %s\n"
      "%.1f tokens/s, %.1f without the prompt\n"
      "seconds: prompt %.3f, draft %.3f, verify %.3f, accept %.3f, commit %.3f, all %.3f\n",
      prompt_tokens, tokens, rounds, rounds > 0 ? tokens / rounds : 0,
      std::string(Name(generation.finish)).c_str(), s.total > 0 ? tokens / s.total : 0,
      s.total > s.prefill ? tokens / (s.total - s.prefill) : 0, s.prefill, s.draft, s.verify,
      s.accept, s.commit, s.total);
  for (int depth = 1; depth < kMaxTreeHeight; ++depth) {
    const NodeCounts& counts = generation.by_depth[depth];
    if (counts.proposed == 0) continue;
    std::fprintf(stderr, "depth %d: accepted %lld of %lld proposed\n", depth,
                 static_cast<long long>(counts.accepted), static_cast<long long>(counts.proposed));
  }
}

absl::StatusOr<Finish> Generate(const ExperimentConfig& config, const std::string& prompt_text,
                                bool raw, bool stats) {
  ASSIGN_OR_RETURN(const std::unique_ptr<ModelStore> store,
                   ModelStore::Create(config, config.tree_nodes));
  ASSIGN_OR_RETURN(const Tokenizer* const tokenizer, store->TokenizerOf(config.target_model));
  ArmOptions options;
  options.use_template = !raw;
  options.positions = static_cast<int64_t>(tokenizer->Encode(prompt_text, false).size()) +
                      config.suite_max_new_tokens + kTemplateSlack;
  ASSIGN_OR_RETURN(const std::unique_ptr<ArmDecoder> arm,
                   ArmDecoder::Create(*store, config, options));
  std::vector<TokenId> prompt;
  if (raw) {
    prompt = arm->tokenizer().Encode(prompt_text, /*add_special_tokens=*/true);
  } else {
    ASSIGN_OR_RETURN(prompt, arm->Prompt({{"user", prompt_text}}));
  }
  StreamingSink sink(arm->tokenizer(), isatty(STDOUT_FILENO) != 0);
  DecodeRequest request = arm->Request(/*request=*/0);
  request.prompt = prompt;
  request.sink = &sink;
  request.stop = CatchStopSignals();
  Generation generation;
  RETURN_IF_ERROR(arm->loop().Decode({&request, 1}, {&generation, 1}));
  sink.Finish();
  if (stats) PrintStats(generation, static_cast<int>(prompt.size()));
  return generation.finish;
}

}  // namespace

int RunGenerateCommand(std::span<const std::string> args) {
  std::vector<std::string> keys;
  std::string prompt;
  bool raw = false, stats = false, draft = false, drafter = false, target = false;
  bool have_prompt = false;
  for (size_t i = 0; i < args.size(); ++i) {
    std::string name = args[i];
    if (name == "--help" || name == "-h") {
      PrintUsage();
      return kExitOk;
    }
    if (name == "--raw" || name == "--stats") {
      (name == "--raw" ? raw : stats) = true;
      continue;
    }
    std::string value;
    if (const size_t equals = name.find('='); equals != std::string::npos) {
      value = name.substr(equals + 1);
      name.resize(equals);
    } else if (i + 1 < args.size()) {
      value = args[++i];
    } else {
      return ReportUsage("generate", absl::StrCat("'", name, "' needs a value"));
    }
    if (name == "--prompt") {
      prompt = value;
      have_prompt = true;
      continue;
    }
    const Flag* found = nullptr;
    for (const Flag& flag : kFlags) {
      if (name == flag.name || name == flag.key) found = &flag;
    }
    if (found == nullptr) {
      return ReportUsage("generate", absl::StrCat("there is no flag '", name,
                                                  "'; `canopy generate --help` shows all"));
    }
    draft = draft || std::string_view(found->name) == "--draft";
    drafter = drafter || std::string_view(found->name) == "--drafter";
    target = target || std::string_view(found->name) == "--target";
    keys.push_back(absl::StrCat(found->key, "=", value));
  }
  if (!target) return ReportUsage("generate", "--target DIR is missing");
  if (!have_prompt || prompt.empty()) return ReportUsage("generate", "--prompt TEXT is missing");
  if (!draft && !drafter) keys.push_back("--draft.kind=none");

  ConfigBuilder builder;
  const absl::Status added = builder.AddArguments(keys);
  if (!added.ok()) return ReportError("generate", added);
  absl::StatusOr<std::vector<ExperimentConfig>> runs = builder.Build();
  if (!runs.ok()) return ReportError("generate", runs.status());
  if (runs->size() != 1) return ReportUsage("generate", "each flag takes one value");
  ExperimentConfig config = runs->front();
  // Keys of experiments that a single prompt has no use for.
  config.suite_questions.assign(1, '-');
  config.run_name = "generate";
  const absl::Status checked = CheckConfig(config);
  if (!checked.ok()) return ReportError("generate", checked);

  absl::StatusOr<Finish> finish = Generate(config, prompt, raw, stats);
  if (!finish.ok()) return ReportError("generate", finish.status());
  if (*finish == Finish::kStopped) {
    return ReportError("generate", absl::CancelledError("interrupted"));
  }
  return kExitOk;
}

}  // namespace canopy
