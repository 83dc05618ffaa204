// canopy inspect: what a checkpoint is, what it costs, and whether its weights are sound.

#include <algorithm>
#include <cstdio>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "core/cpu_backend.h"
#include "core/safetensors.h"
#include "experiments/commands.h"
#include "models/checkpoint.h"
#include "models/loader.h"
#include "models/memory_plan.h"

namespace canopy {
namespace {

namespace po = boost::program_options;

struct InspectOptions {
  std::string folder;
  bool check = false;
  int positions = 0;
  int nodes = 64;
};

std::string Bytes(size_t bytes) {
  constexpr double kUnit = 1000.0;
  if (bytes < 10000) return absl::StrFormat("%d B", bytes);
  double value = static_cast<double>(bytes) / kUnit;
  for (const char* unit : {"kB", "MB", "GB"}) {
    if (value < kUnit) return absl::StrFormat("%.2f %s", value, unit);
    value /= kUnit;
  }
  return absl::StrFormat("%.2f TB", value);
}

std::string Count(int64_t count) {
  if (count < 1'000'000) return absl::StrFormat("%.1f k", count / 1e3);
  if (count < 1'000'000'000) return absl::StrFormat("%.1f M", count / 1e6);
  return absl::StrFormat("%.2f G", count / 1e9);
}

std::string DescribeMixer(const AttentionSpec& spec) {
  return absl::StrFormat("attention  %d heads of %d, %d KV heads, RoPE over %d%s%s", spec.heads,
                         spec.head_dim, spec.kv_heads, 2 * spec.rope_inv_freq.size(),
                         spec.q_norm.empty() ? "" : ", q/k norm",
                         spec.qkv_bias.empty() ? "" : ", bias");
}

std::string DescribeMixer(const SsdSpec& spec) {
  return absl::StrFormat(
      "ssd        %d heads of %d, state %d, %d group%s, convolution %d%s", spec.heads,
      spec.head_dim, spec.d_state, spec.groups, spec.groups == 1 ? "" : "s", spec.conv_kernel,
      spec.groups == 1 ? "" : absl::StrFormat(", norm over %d slices", spec.norm_groups));
}

std::string DescribeBlock(const BlockSpec& block) {
  std::string text =
      std::visit([](const auto& mixer) { return DescribeMixer(mixer); }, block.mixer);
  if (block.mlp) absl::StrAppend(&text, "; MLP ", block.mlp->intermediate);
  return text;
}

// Runs of equal layers on a line each, with the bytes of a pending node.
void PrintLayers(const DecoderSpec& spec, const MemoryPlan& plan) {
  std::printf("\n%-9s %-13s %s\n", "layers", "pending node", "mixer and MLP");
  for (size_t first = 0; first < spec.blocks.size();) {
    const std::string text = DescribeBlock(spec.blocks[first]);
    size_t last = first;
    while (last + 1 < spec.blocks.size() && DescribeBlock(spec.blocks[last + 1]) == text) ++last;
    const std::string range = first == last ? absl::StrCat(first) : absl::StrCat(first, "-", last);
    std::printf("%-9s %-13s %s\n", range.c_str(), Bytes(plan.layers[first].per_node).c_str(),
                text.c_str());
    first = last + 1;
  }
}

void PrintModel(const ModelInfo& info, const Checkpoint& checkpoint) {
  const size_t files = checkpoint.tensors().files().size();
  std::printf("architecture  %s, %d layers, hidden size %d\n", info.architecture.c_str(),
              info.layers, info.hidden_size);
  std::printf("checkpoint    %s: %d file%s, xxh64 %s\n", info.path.c_str(), static_cast<int>(files),
              files == 1 ? "" : "s", info.checkpoint_hash.c_str());
  const std::string_view dtype = Name(info.dtype);
  std::printf("parameters    %s (%d), %.*s\n", Count(info.parameters).c_str(),
              static_cast<int>(info.parameters), static_cast<int>(dtype.size()), dtype.data());
  std::printf("vocabulary    %d, end of text: %s\n", info.vocab_size,
              info.eos_tokens.empty()
                  ? "none"
                  : absl::StrJoin(info.eos_tokens, ", ", [](std::string* out, TokenId token) {
                      absl::StrAppend(out, token.value);
                    }).c_str());
  std::printf("positions     %s\n", info.max_positions == INT32_MAX
                                        ? "no limit"
                                        : absl::StrCat("at most ", info.max_positions).c_str());
}

void PrintMemory(const ModelInfo& info, const MemoryPlan& plan, const StateOptions& options) {
  const StatePlan& state = plan.total;
  std::printf("\nmemory\n");
  const auto row = [](const char* what, size_t bytes, const std::string& note) {
    std::printf("  %-30s %12s  %s\n", what, Bytes(bytes).c_str(), note.c_str());
  };
  row("weights", info.weight_bytes, absl::StrCat("matrices ", Bytes(plan.matrices)));
  row("state: checkpoints", state.checkpoint, "recurrent states and the convolutions' tails");
  row("state: unfolded rows", state.ring, absl::StrCat(2 * kSegment, " positions"));
  row("state: per position", state.per_position, "keys and values of the prefix");
  row("pending node", state.per_node,
      absl::StrCat(state.per_node_unpadded, " B of numbers, the rest pads rows to 64 B"));
  row("a whole state", state.Total(options),
      absl::StrCat(options.max_positions, " positions, ", options.max_pending, " pending nodes"));
}

absl::Status CheckWeights(const Checkpoint& checkpoint) {
  const std::vector<NonFiniteTensor> found = FindNonFinite(checkpoint.tensors());
  if (found.empty()) {
    std::printf("check         all weights are finite\n");
    return absl::OkStatus();
  }
  for (const NonFiniteTensor& tensor : found) {
    std::printf("not finite    %s\n", tensor.ToString().c_str());
  }
  return absl::DataLossError(
      absl::StrCat(found.size(), found.size() == 1 ? " tensor has" : " tensors have",
                   " values that are not finite; the first: ", found.front().ToString()));
}

absl::Status Inspect(const InspectOptions& options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<CpuBackend> backend, CpuBackend::Create(1));
  ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(*backend, options.folder));
  if (options.check) RETURN_IF_ERROR(CheckWeights(checkpoint));
  ASSIGN_OR_RETURN(DecoderSpec spec, ReadSpec(checkpoint));
  PrintModel(spec.info, checkpoint);
  const MemoryPlan plan = PlanMemory(spec);
  PrintLayers(spec, plan);
  ASSIGN_OR_RETURN(const std::unique_ptr<LanguageModel> model,
                   MakeDecoder(*backend, std::move(spec)));
  const size_t weights = backend->memory().bytes_in_use;
  if (weights != plan.matrices) {
    return absl::InternalError(absl::StrCat("memory of the matrices: the allocator gave ", weights,
                                            " bytes, the model's sizes ask for ", plan.matrices));
  }
  const int limit = model->info().max_positions;
  const int positions = options.positions > 0 ? options.positions : std::min(limit, 2048);
  PrintMemory(model->info(), plan, {.max_positions = positions, .max_pending = options.nodes});
  RETURN_IF_ERROR(CheckMemory(*backend, *model, plan));
  std::printf("  the allocator gave the same for states of several sizes\n");
  return absl::OkStatus();
}

}  // namespace

int RunInspectCommand(std::span<const std::string> args) {
  InspectOptions options;
  po::options_description flags("canopy inspect DIR [--check]");
  flags.add_options()("help", "prints this")(
      "check", po::bool_switch(&options.check),
      "also scan the weights and name the tensors with values that are not finite")(
      "positions", po::value(&options.positions),
      "prefix length of the state whose size is shown (the model's limit or 2048, the smaller)")(
      "nodes", po::value(&options.nodes)->default_value(options.nodes), "its pending nodes")(
      "folder", po::value(&options.folder), "DIR, also without the flag's name");
  po::variables_map values;
  if (const int code = ReadFlags("inspect", args, flags, "folder", &values); code >= 0) return code;
  if (values.count("positions") > 0 && options.positions < 1) {
    return ReportUsage("inspect", "--positions must be 1 or more");
  }
  if (options.folder.empty()) return ReportUsage("inspect", "expected a checkpoint folder");
  if (options.nodes < 1) return ReportUsage("inspect", "--nodes must be 1 or more");
  const absl::Status status = Inspect(options);
  return status.ok() ? kExitOk : ReportError("inspect", status);
}

}  // namespace canopy
