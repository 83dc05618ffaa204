// canopy golden: compares a model with what another implementation computes for it.

#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "experiments/commands.h"
#include "models/golden.h"
#include "models/loader.h"

namespace canopy {
namespace {

namespace po = boost::program_options;

struct GoldenOptions {
  std::string model;
  std::string golden;
  double tolerance = 2e-3;
  std::string device = "cpu";
  std::string dtype = "auto";
  int threads = 0;
};

absl::StatusOr<GoldenReport> Compare(const GoldenOptions& options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend,
                   MakeBackend(options.device, options.threads));
  ASSIGN_OR_RETURN(const std::unique_ptr<LanguageModel> model,
                   LoadModel(*backend, options.model, options.dtype));
  return CompareWithGolden(*model, options.golden, options.tolerance);
}

}  // namespace

int RunGoldenCommand(std::span<const std::string> args) {
  GoldenOptions options;
  po::options_description flags("canopy golden --model DIR --golden FILE");
  flags.add_options()("help", "prints this")("model", po::value(&options.model)->required(),
                                             "checkpoint folder")(
      "golden", po::value(&options.golden)->required(), "golden file (safetensors)")(
      "tolerance", po::value(&options.tolerance)->default_value(options.tolerance, "0.002"),
      "greatest difference of a logit that passes")(
      "device", po::value(&options.device)->default_value(options.device), "cpu, cuda or cuda:N")(
      "dtype", po::value(&options.dtype)->default_value(options.dtype),
      "on a GPU: auto, bf16 or f32")("threads", po::value(&options.threads)->default_value(0),
                                     "0: one a core");
  po::variables_map values;
  if (const int code = ReadFlags("golden", args, flags, "", &values); code >= 0) return code;
  if (!(options.tolerance >= 0)) return ReportUsage("golden", "--tolerance must be 0 or more");
  if (options.threads < 0) return ReportUsage("golden", "--threads must be 0 or more");

  const absl::StatusOr<GoldenReport> report = Compare(options);
  if (!report.ok()) return ReportError("golden", report.status());
  std::printf("%s\n", report->ToJson().c_str());
  if (report->passed) return kExitOk;
  return ReportError("golden", absl::FailedPreconditionError(absl::StrCat(
                                   options.model, " differs from ", options.golden,
                                   ": an error is above the tolerance ", options.tolerance,
                                   ", or a greedy id differs where it should not")));
}

}  // namespace canopy
