// Does an experiment's answer depend on what it must not depend on?
//
// CheckSettings runs a config under two settings (devices, dtypes, threads, drafters, ...): token
// ids must be equal, and logits of the same tokens must not differ by more than a tolerance.
// CheckExact runs all of a config's trees and drafters under one setting: wherever two of them
// score the same token path, the logits must be equal to the last bit, and so must all token ids
// that are to be plain decoding's.

#ifndef CANOPY_EXPERIMENTS_CHECK_H_
#define CANOPY_EXPERIMENTS_CHECK_H_

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/status.h"
#include "experiments/config.h"
#include "experiments/decode_loop.h"

namespace canopy {

struct CheckOptions {
  double tolerance = 2e-3;  // of CheckSettings: greatest difference of a logit that passes
  FILE* out = stdout;
  FILE* progress = stderr;
  const std::atomic<bool>* stop = nullptr;  // looked at after every round
};

struct CheckReport {
  int64_t answers = 0;            // compared
  int64_t answers_different = 0;  // in a token id
  int64_t failed = 0;             // answers that could not be had
  // Rows of logits that were compared, and those that differ: beyond the tolerance, or in a bit.
  int64_t rows = 0;
  int64_t rows_different = 0;
  double greatest_difference = 0.0;  // CheckSettings; infinite where a logit is not a number

  // Nothing differs, and something was compared.
  bool passed() const {
    return answers_different == 0 && failed == 0 && rows_different == 0 && rows > 0;
  }
};

// The first few differences, to be shown, and how many there were.
class Differences {
 public:
  static constexpr int kShown = 5;
  void Add(std::string text);
  void Print(FILE* out) const;
  const std::vector<std::string>& shown() const { return shown_; }

 private:
  std::vector<std::string> shown_;
  int64_t count_ = 0;
};

// 128 bits of a token path or of a row of logits.
struct Digest {
  uint64_t low = 0, high = 0;
  friend auto operator<=>(const Digest&, const Digest&) = default;
};

// What every node of every tree scored, by its token path; finds where two scores of a path differ
// in a bit. Keeps some hundred bytes a path.
class PathScores final : public ScoreSink {
 public:
  explicit PathScores(Differences* differences) : differences_(differences) {}

  // From here on: whose scores they are. Scores of different models have nothing in common.
  void Begin(const std::string& model, const std::string& method, int64_t question);
  void OnScores(std::span<const TokenId> tokens, const TokenTree& tree,
                const TargetScores& scores) override;

  int64_t scored() const { return scored_; }        // nodes
  int64_t compared() const { return compared_; }    // nodes of a path that was scored before
  int64_t different() const { return different_; }  // of those, in a bit

 private:
  struct Entry {
    Digest row;
    std::string method;  // who scored it first
  };
  Differences* differences_;
  Digest model_;
  std::string method_;
  int64_t question_ = 0;
  int64_t scored_ = 0, compared_ = 0, different_ = 0;
  std::map<Digest, Entry> rows_;
  std::vector<Digest> paths_;
};

// Runs of `a` and `b` are compared one by one, so there must be as many. Errors as of
// RunExperiment; Cancelled where it was stopped. A table goes to options.out, with the first places
// that differ.
absl::StatusOr<CheckReport> CheckSettings(const ParsedConfig& a, const ParsedConfig& b,
                                          const CheckOptions& options);
absl::StatusOr<CheckReport> CheckExact(const ParsedConfig& parsed, const CheckOptions& options);

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_CHECK_H_
