// canopy bench: what a pass costs by its number of nodes, beside the bytes that it has to move and
// the bandwidth that the device has.

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "experiments/commands.h"
#include "experiments/version.h"
#include "models/loader.h"
#include "models/synthetic.h"
#include "nlohmann/json.hpp"
#include "trees/token_tree.h"
#ifdef CANOPY_CUDA
#include "core/cuda/ceilings.h"
#include "models/decoder_cuda.h"
#endif

namespace canopy {
namespace {

namespace po = boost::program_options;

struct BenchOptions {
  std::string model;
  std::string device = "cuda";
  std::string dtype = "auto";
  std::vector<int> nodes = {1, 2, 4, 8, 16, 32, 64};
  std::vector<int> contexts = {128};
  int repetitions = 50;
  bool compare = false;
  std::string json;
};

#ifdef CANOPY_CUDA

struct Spread {
  double median = 0.0, p10 = 0.0, p90 = 0.0;
};

Spread SpreadOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return {values[n / 2], values[n / 10], values[n * 9 / 10]};
}

// Like a draft tree: children of random nodes, at most eight levels below the last token.
TokenTree BenchTree(std::mt19937_64& rng, int nodes, int vocab) {
  TokenTree tree;
  const auto token = [&] { return TokenId(static_cast<int>(rng() % vocab)); };
  CHECK(tree.AddNode(kPrefix, token()).ok());
  while (tree.size() < nodes) {
    const NodeId parent(static_cast<int>(rng() % tree.size()));
    if (tree.depth(parent) < 8) (void)tree.AddNode(parent, token());
  }
  return tree;
}

absl::Status WriteJson(const std::string& path, const nlohmann::json& json) {
  std::ofstream file(path);
  file << json.dump(1) << "\n";
  file.close();
  if (!file) return absl::UnavailableError(absl::StrCat(path, ": cannot be written"));
  return absl::OkStatus();
}

absl::Status Compare(CudaBackend& cuda, const CudaModel& model, const BenchOptions& options,
                     nlohmann::json* out) {
  std::printf(
      "\nproducts alone, bf16, us, by rows; ours reads its weights from memory as cuBLAS does\n");
  std::printf("  %-24s", "out x in");
  for (int rows : options.nodes) std::printf("  %6d cublas    ours", rows);
  std::printf("\n");
  for (const ProductShape& product : model.Products()) {
    std::printf("  %-24s", absl::StrFormat("%d x %d", product.out, product.in).c_str());
    for (int rows : options.nodes) {
      ASSIGN_OR_RETURN(const double cublas,
                       TimeCublasProduct(cuda, rows, product.out, product.in, options.repetitions));
      ASSIGN_OR_RETURN(const std::vector<double> times,
                       model.TimeProduct(product, rows, options.repetitions));
      const double own = SpreadOf(times).median;
      std::printf("  %13.2f %7.2f", 1e6 * cublas, 1e6 * own);
      (*out)["products"].push_back({{"out", product.out},
                                    {"in", product.in},
                                    {"rows", rows},
                                    {"cublas_seconds", cublas},
                                    {"seconds", own}});
    }
    std::printf("\n");
  }
  return absl::OkStatus();
}

absl::Status RunBench(BenchOptions options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, MakeBackend(options.device, 0));
  if (backend->kind() != DeviceKind::kCuda) {
    return absl::InvalidArgumentError(
        "bench measures CUDA devices; for the CPU run build/release/model_bench --model=DIR");
  }
  auto& cuda = static_cast<CudaBackend&>(*backend);
  ASSIGN_OR_RETURN(const std::unique_ptr<LanguageModel> loaded,
                   LoadModel(*backend, options.model, options.dtype));
  const auto& model = static_cast<const CudaModel&>(*loaded);
  const auto too_many = [&](int nodes) { return nodes > model.MaxRows(); };
  if (std::all_of(options.nodes.begin(), options.nodes.end(), too_many)) {
    return absl::InvalidArgumentError(absl::StrCat("--nodes: a pass of this model on ",
                                                   backend->Description(), " has at most ",
                                                   model.MaxRows(), " nodes"));
  }
  if (std::erase_if(options.nodes, too_many) > 0) {
    std::printf("a pass of this model on this device has at most %d nodes\n", model.MaxRows());
  }
  ASSIGN_OR_RETURN(const double bandwidth, MeasureReadBandwidth(cuda));
  const bool synthetic = options.model.starts_with(kSyntheticPrefix);
  std::printf("%s on %s, %s%s\n", options.model.c_str(), backend->Description().c_str(),
              std::string(Name(model.info().dtype)).c_str(),
              synthetic ? ", random weights of the published shape" : "");
  std::printf("read bandwidth %.0f GB/s; revision %s\n", 1e-9 * bandwidth, GitRevision());
  nlohmann::json json = {
      {"model", options.model},           {"synthetic", synthetic},
      {"device", backend->Description()}, {"dtype", std::string(Name(model.info().dtype))},
      {"revision", GitRevision()},        {"read_bytes_per_second", bandwidth}};
  std::mt19937_64 rng(1);
  const int vocab = model.info().vocab_size;
  for (int context : options.contexts) {
    const int positions = context + kMaxTreeHeight;
    if (positions > model.info().max_positions) {
      return absl::InvalidArgumentError(absl::StrCat("--context=", context, ": the model has ",
                                                     model.info().max_positions, " positions"));
    }
    ASSIGN_OR_RETURN(const std::unique_ptr<DecodeState> state,
                     model.NewState({.max_positions = positions, .max_pending = 64}));
    ASSIGN_OR_RETURN(const std::unique_ptr<Workspace> workspace, model.NewWorkspace(128));
    std::vector<TokenId> prompt;
    for (int i = 0; i < context; ++i) prompt.emplace_back(static_cast<int>(rng() % vocab));
    const ForwardItem prefill{
        .state = state.get(), .tokens = prompt, .logits = LogitsOf::kNone, .commit_chain = true};
    RETURN_IF_ERROR(model.Forward({&prefill, 1}, *workspace).status());
    std::printf(
        "\ncontext %d, %d repetitions after a warm-up\n"
        "  nodes   median us      p10      p90   MB moved    GB/s  of read   x one node\n",
        context, options.repetitions);
    double one_node = 0.0;
    std::vector<std::map<std::string, double>> breakdowns;
    for (int nodes : options.nodes) {
      const TokenTree tree = BenchTree(rng, nodes, vocab);
      const ForwardItem item{
          .state = state.get(), .tokens = tree.tokens(), .parents = tree.parents(), .top = 1};
      RETURN_IF_ERROR(model.Forward({&item, 1}, *workspace).status());
      RETURN_IF_ERROR(model.Repeat(*workspace, 10).status());
      ASSIGN_OR_RETURN(const std::vector<double> times,
                       model.Repeat(*workspace, options.repetitions));
      ASSIGN_OR_RETURN(const std::vector<OperatorTime> operators, model.Breakdown(*workspace));
      const Spread spread = SpreadOf(times);
      if (one_node == 0.0) one_node = spread.median;
      const double bytes = static_cast<double>(model.PassBytes(nodes, context));
      const double rate = bytes / spread.median;
      std::printf("  %5d  %10.2f %8.2f %8.2f  %9.2f %7.0f  %6.1f%%  %9.3f\n", nodes,
                  1e6 * spread.median, 1e6 * spread.p10, 1e6 * spread.p90, 1e-6 * bytes,
                  1e-9 * rate, 100 * rate / bandwidth, spread.median / one_node);
      std::map<std::string, double> by_name;
      for (const OperatorTime& time : operators) by_name[time.name] += time.share;
      nlohmann::json shares;
      for (const auto& [name, share] : by_name) shares[name] = share * spread.median;
      json["passes"].push_back({{"context", context},
                                {"nodes", nodes},
                                {"seconds", spread.median},
                                {"seconds_p10", spread.p10},
                                {"seconds_p90", spread.p90},
                                {"bytes", bytes},
                                {"operators_seconds", shares}});
      breakdowns.push_back(std::move(by_name));
      for (auto& [name, share] : breakdowns.back()) share *= spread.median;
      state->DropPending();
    }
    std::printf("\nus by operator, in one multiprocessor, its waiting for others included\n  %-26s",
                "");
    for (int nodes : options.nodes) std::printf(" %9d", nodes);
    std::printf("\n");
    for (const auto& [name, unused] : breakdowns.front()) {
      std::printf("  %-26s", name.c_str());
      for (auto& breakdown : breakdowns) std::printf(" %9.2f", 1e6 * breakdown[name]);
      std::printf("\n");
    }
  }
  if (options.compare) RETURN_IF_ERROR(Compare(cuda, model, options, &json));
  if (!options.json.empty()) RETURN_IF_ERROR(WriteJson(options.json, json));
  return absl::OkStatus();
}

#else

absl::Status RunBench(BenchOptions) {
  return absl::FailedPreconditionError(
      "this build of canopy has no CUDA (configure it with -DCANOPY_CUDA=ON); for the CPU run "
      "build/release/model_bench --model=DIR");
}

#endif

// "1,2,4": numbers from `low` to `high`.
bool ParseList(const std::string& text, int low, int high, std::vector<int>* values) {
  values->clear();
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    int value = 0;
    if (!absl::SimpleAtoi(part, &value) || value < low || value > high) return false;
    values->push_back(value);
  }
  return true;
}

}  // namespace

int RunBenchCommand(std::span<const std::string> args) {
  BenchOptions options;
  std::string nodes = "1,2,4,8,16,32,64";
  std::string contexts = "128";
  po::options_description flags("canopy bench --model DIR --device cuda");
  flags.add_options()("help", "prints this")("model", po::value(&options.model)->required(),
                                             "checkpoint folder or synthetic:NAME")(
      "device", po::value(&options.device)->default_value(options.device), "cuda or cuda:N")(
      "dtype", po::value(&options.dtype)->default_value(options.dtype), "auto, bf16 or f32")(
      "nodes", po::value(&nodes)->default_value(nodes), "numbers of nodes, 1 to 64")(
      "context", po::value(&contexts)->default_value(contexts), "lengths of the prefix")(
      "repetitions", po::value(&options.repetitions)->default_value(options.repetitions),
      "of each pass")("compare", po::bool_switch(&options.compare),
                      "also the same products through cuBLAS")("json", po::value(&options.json),
                                                               "file for the figures");
  po::variables_map values;
  if (const int code = ReadFlags("bench", args, flags, "", &values); code >= 0) return code;
  if (!ParseList(nodes, 1, 64, &options.nodes)) {
    return ReportUsage("bench", "--nodes must be numbers from 1 to 64, separated by commas");
  }
  if (!ParseList(contexts, 1, 1 << 24, &options.contexts)) {
    return ReportUsage("bench", "--context must be positive numbers, separated by commas");
  }
  if (options.repetitions < 1 || options.repetitions > 10000) {
    return ReportUsage("bench", "--repetitions must be 1 to 10000");
  }
  const absl::Status status = RunBench(options);
  return status.ok() ? kExitOk : ReportError("bench", status);
}

}  // namespace canopy
