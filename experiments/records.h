// Results on disk: one JSON line per question, arm and repetition in RESULTS/records.jsonl, and the
// answer files that Spec-Bench's scripts read.
//
// A record is either whole or absent: it is appended in one write and synced, a failed write is
// taken back, and a line that a crash cut short is removed when the file is opened again.
// docs/results.md describes the fields.

#ifndef CANOPY_EXPERIMENTS_RECORDS_H_
#define CANOPY_EXPERIMENTS_RECORDS_H_

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "experiments/config.h"
#include "experiments/decode_loop.h"

namespace canopy {

// Raised when a field changes its meaning; files of another version are refused.
inline constexpr int kRecordSchema = 1;

// What is the same for all records of an arm.
struct RecordContext {
  ExperimentConfig config;
  std::string target_hash;  // of the checkpoints' bytes
  std::string draft_hash;   // empty without a draft model
  std::string target_dtype;
  std::string draft_dtype;
  std::string device;
  size_t draft_bytes = 0;  // drafter and its state, weights included
};

struct TurnRecord {
  int prompt_tokens = 0;
  std::vector<int32_t> tokens;
  std::string text;  // without special tokens
  std::string finish;
  std::vector<int32_t> accept_lengths;  // one a round
  PhaseSeconds seconds;

  friend bool operator==(const TurnRecord& a, const TurnRecord& b) { return a.tokens == b.tokens; }
};

struct StateBytes {
  int64_t checkpoint = 0;
  int64_t ring = 0;
  int64_t kv_per_position = 0;
  int64_t pending_per_node = 0;
  int64_t total = 0;
  int64_t max_pending_nodes = 0;  // most nodes of a tree of this record
};

struct QuestionRecord {
  std::string run;  // ConfigHash of the arm
  std::string arm;
  int repetition = 0;
  int64_t question_id = 0;
  std::string category;
  std::string error;  // empty: answered; else why there is no answer (turns holds those before)
  std::vector<TurnRecord> turns;
  std::vector<NodeCounts> by_depth;  // [0] is depth 1
  std::vector<NodeCounts> by_rank;   // [0] is rank 0
  StateBytes state;

  bool ok() const { return error.empty(); }
  int64_t tokens() const;
  int64_t rounds() const;
  PhaseSeconds seconds() const;  // of all turns
};

// One line without its end. InvalidArgument if a number is not finite.
absl::StatusOr<std::string> RecordLine(const QuestionRecord& record, const RecordContext& context);
// What a record line says; `context` may be null. InvalidArgument names the field that is missing
// or of another type, or a schema version that is not this one's.
absl::StatusOr<QuestionRecord> ParseRecordLine(std::string_view line, RecordContext* context);

// The records of a results folder, open for appending by one process at a time.
class RecordFile {
 public:
  struct Entry {
    QuestionRecord record;
    RecordContext context;
  };

  // Makes the folder and the file where they are missing, and reads what is there. PermissionDenied
  // or NotFound if that cannot be done, FailedPrecondition if another process has it open,
  // InvalidArgument names the line of a broken record. Of two records of the same question,
  // arm and repetition the later one counts.
  static absl::StatusOr<RecordFile> Open(const std::string& folder);
  RecordFile(RecordFile&& other) noexcept;
  RecordFile& operator=(RecordFile&&) = delete;
  ~RecordFile();

  const std::string& path() const { return path_; }
  std::vector<Entry>& entries() { return entries_; }
  // Whether a line that was cut short was removed.
  bool repaired() const { return repaired_; }

  // Appends. ResourceExhausted (disk full) and other errors leave the file as it was. The disk is
  // synced once a second at most, as a sync takes longer than many an answer of a small model: a
  // crash of the process loses nothing, one of the machine the last second.
  absl::Status Append(const QuestionRecord& record, const RecordContext& context);
  // Syncs what was appended.
  absl::Status Sync();

 private:
  RecordFile() = default;

  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
  std::chrono::steady_clock::time_point synced_;  // start of the clock: never
  bool unsynced_ = false;
  bool repaired_ = false;
  std::vector<Entry> entries_;
};

// Writes a file so that it is either the old one or the new one: to a name beside it, synced,
// renamed.
absl::Status WriteWhole(const std::string& path, std::string_view text);

// An answer file as Spec-Bench's evaluation/eval.py writes it, ordered by question; failed
// questions are left out, as speed.py would count them as answers.
absl::StatusOr<std::string> SpecBenchAnswers(std::span<const QuestionRecord* const> records,
                                             const std::string& model_id);

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_RECORDS_H_
