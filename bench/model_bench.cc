// Passes of a model against this machine's ceilings, measured in one run and interleaved, so that
// the ratios hold on a machine whose speed drifts.
//
//   build/release/model_bench --model=data/models/tiny-bamba-4m
//
// Prints medians: passes of 1 to 64 nodes behind a context, a prompt, and what commits and folds
// cost.

#include <algorithm>
#include <boost/program_options.hpp>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "bench/ceilings.h"
#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "models/loader.h"
#include "trees/token_tree.h"

namespace canopy {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point from) {
  return std::chrono::duration<double>(Clock::now() - from).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Options {
  std::string model;
  int threads = 0;
  int repetitions = 60;
  int context = 128;
  int prompt = 512;
};

class Bench {
 public:
  static absl::Status Run(const Options& options) {
    Bench bench(options);
    return bench.RunAll();
  }

 private:
  explicit Bench(const Options& options) : options_(options) {}

  absl::Status RunAll() {
    ASSIGN_OR_RETURN(cpu_, CpuBackend::Create(options_.threads));
    ASSIGN_OR_RETURN(model_, LoadModel(*cpu_, options_.model));
    const int longest = std::max(options_.prompt, options_.context + 256);
    ASSIGN_OR_RETURN(state_, model_->NewState({.max_positions = longest + 64, .max_pending = 64}));
    ASSIGN_OR_RETURN(workspace_, model_->NewWorkspace(options_.prompt));
    for (int i = 0; i < longest; ++i) tokens_.push_back(RandomToken());
    for (int nodes : {1, 2, 4, 8, 16, 32, 64}) {
      TokenTree tree;
      RETURN_IF_ERROR(tree.AddNode(kPrefix, RandomToken()).status());
      while (tree.size() < nodes) {
        // Like a draft tree: children of recent nodes, at most a few levels.
        const NodeId parent(static_cast<int>(rng_() % tree.size()));
        if (tree.depth(parent) < 8) (void)tree.AddNode(parent, RandomToken());
      }
      trees_[nodes] = std::move(tree);
    }
    RETURN_IF_ERROR(Passes(3));  // warm-up
    pass_seconds_.clear();
    prompt_seconds_.clear();
    const double bandwidth_before = MeasureReadBandwidth(*cpu_, 512u << 20);
    const double peak_before = MeasureMultiplyAddPeak(*cpu_);
    RETURN_IF_ERROR(Passes(options_.repetitions));
    RETURN_IF_ERROR(Commits());
    const double bandwidth = (bandwidth_before + MeasureReadBandwidth(*cpu_, 512u << 20)) / 2;
    const double peak = (peak_before + MeasureMultiplyAddPeak(*cpu_)) / 2;
    Report(bandwidth, peak);
    return absl::OkStatus();
  }

  TokenId RandomToken() {
    return TokenId(static_cast<int>(rng_() % static_cast<unsigned>(model_->info().vocab_size)));
  }

  absl::Status Prompt(int length) {
    state_->Reset();
    const ForwardItem item{.state = state_.get(),
                           .tokens = std::span(tokens_).first(length),
                           .logits = LogitsOf::kLast,
                           .commit_chain = true};
    return model_->Forward({&item, 1}, *workspace_).status();
  }

  absl::Status Passes(int repetitions) {
    for (int r = 0; r < repetitions; ++r) {
      if (r % 8 == 0) {
        const auto start = Clock::now();
        RETURN_IF_ERROR(Prompt(options_.prompt));
        prompt_seconds_.push_back(Seconds(start));
        RETURN_IF_ERROR(Prompt(options_.context));
      }
      for (const auto& [nodes, tree] : trees_) {
        state_->DropPending();
        const ForwardItem item{
            .state = state_.get(), .tokens = tree.tokens(), .parents = tree.parents()};
        const auto start = Clock::now();
        RETURN_IF_ERROR(model_->Forward({&item, 1}, *workspace_).status());
        pass_seconds_[nodes].push_back(Seconds(start));
      }
    }
    state_->DropPending();
    return absl::OkStatus();
  }

  // Plain decoding: a one-node pass and its commit, through whole segments.
  absl::Status Commits() {
    RETURN_IF_ERROR(Prompt(options_.context));
    for (int i = 0; i < 256; ++i) {
      const NodeId parent = kPrefix;
      const ForwardItem item{
          .state = state_.get(), .tokens = {&tokens_[i], 1}, .parents = {&parent, 1}};
      const auto start = Clock::now();
      RETURN_IF_ERROR(model_->Forward({&item, 1}, *workspace_).status());
      step_seconds_ += Seconds(start);
      const auto commit = Clock::now();
      const NodeId node(0);
      RETURN_IF_ERROR(state_->Commit({&node, 1}));
      commit_seconds_ += Seconds(commit);
    }
    return absl::OkStatus();
  }

  void Report(double bandwidth, double peak) const {
    const ModelInfo& info = model_->info();
    const double step = Median(pass_seconds_.at(1));
    const double prompt = Median(prompt_seconds_);
    std::printf("%s on %s, context %d, %d repetitions, medians\n", info.path.c_str(),
                cpu_->Description().c_str(), options_.context, options_.repetitions);
    std::printf("read bandwidth %.1f GB/s, f32 multiply-add peak %.1f G/s, weights %.1f MB\n",
                bandwidth / 1e9, peak / 1e9, info.weight_bytes / 1e6);
    nlohmann::json json = {{"model", info.path},
                           {"device", cpu_->Description()},
                           {"context", options_.context},
                           {"repetitions", options_.repetitions},
                           {"read_bandwidth_bytes_per_s", bandwidth},
                           {"multiply_add_peak_per_s", peak},
                           {"weight_bytes", info.weight_bytes}};
    for (const auto& [nodes, seconds] : pass_seconds_) {
      const double median = Median(seconds);
      std::vector<double> sorted = seconds;
      std::sort(sorted.begin(), sorted.end());
      std::printf("%3d nodes  %8.3f ms (p10 %.3f, p90 %.3f)  %5.2f x one node\n", nodes,
                  median * 1e3, sorted[sorted.size() / 10] * 1e3,
                  sorted[sorted.size() * 9 / 10] * 1e3, median / step);
      json["passes"].push_back({{"nodes", nodes}, {"median_s", median}, {"ratio", median / step}});
    }
    const double weights_share = info.weight_bytes / step / bandwidth;
    const double prompt_share =
        static_cast<double>(info.layer_parameters) * options_.prompt / prompt / peak;
    const double commit_share = commit_seconds_ / step_seconds_;
    std::printf("one-node step reads its weights at %.0f%% of the read bandwidth\n",
                100 * weights_share);
    std::printf(
        "%d-token prompt %.1f ms: %.0f%% of the multiply-add peak (layers' matrices only)\n",
        options_.prompt, prompt * 1e3, 100 * prompt_share);
    std::printf("commit and fold: %.2f%% of a step\n", 100 * commit_share);
    json["weights_share_of_bandwidth"] = weights_share;
    json["prompt_s"] = prompt;
    json["prompt_share_of_peak"] = prompt_share;
    json["commit_share_of_step"] = commit_share;
    std::printf("%s\n", json.dump().c_str());
  }

  Options options_;
  std::mt19937_64 rng_{1};
  std::unique_ptr<CpuBackend> cpu_;
  std::unique_ptr<LanguageModel> model_;
  std::unique_ptr<DecodeState> state_;
  std::unique_ptr<Workspace> workspace_;
  std::vector<TokenId> tokens_;
  std::map<int, TokenTree> trees_;
  std::map<int, std::vector<double>> pass_seconds_;
  std::vector<double> prompt_seconds_;
  double step_seconds_ = 0.0;
  double commit_seconds_ = 0.0;
};

}  // namespace
}  // namespace canopy

int main(int argc, char** argv) {
  canopy::Options options;
  boost::program_options::options_description described("model_bench");
  described.add_options()("help", "this text")(
      "model", boost::program_options::value(&options.model)->required(), "checkpoint folder")(
      "threads", boost::program_options::value(&options.threads), "0: all cores")(
      "repetitions", boost::program_options::value(&options.repetitions), "interleaved rounds")(
      "context", boost::program_options::value(&options.context), "tokens before the trees")(
      "prompt", boost::program_options::value(&options.prompt), "tokens of the timed prompt");
  try {
    boost::program_options::variables_map values;
    boost::program_options::store(boost::program_options::parse_command_line(argc, argv, described),
                                  values);
    if (values.count("help") != 0) {
      std::cout << described;
      return 0;
    }
    boost::program_options::notify(values);
  } catch (const boost::program_options::error& error) {
    std::cerr << "model_bench: " << error.what() << "\n";
    return 2;
  }
  if (const absl::Status status = canopy::Bench::Run(options); !status.ok()) {
    std::cerr << "model_bench: " << status.message() << "\n";
    return 1;
  }
  return 0;
}
