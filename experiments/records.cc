#include "experiments/records.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <numeric>
#include <tuple>
#include <utility>

#include "experiments/suite.h"
#include "experiments/version.h"
#include "nlohmann/json.hpp"

namespace canopy {
namespace {

using nlohmann::json;
// Keeps the order in which fields are written, which is the order in which they are read.
using nlohmann::ordered_json;

constexpr std::chrono::seconds kSyncInterval(1);

absl::Status SystemError(const std::string& what, int error) {
  const std::string message = absl::StrCat(what, ": ", std::strerror(error));
  switch (error) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return absl::ResourceExhaustedError(
          absl::StrCat(message, "; free some space and start the same command again to go on"));
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(
          absl::StrCat(message, "; choose another folder with --run.results=FOLDER"));
    case ENOENT:
      return absl::NotFoundError(message);
    default:
      return absl::UnknownError(message);
  }
}

// Writes everything at the end of fd, retrying what a signal interrupted.
int WriteAll(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd, text.data(), text.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    text.remove_prefix(static_cast<size_t>(written));
  }
  return 0;
}

absl::StatusOr<std::string> ReadAll(int fd, const std::string& path) {
  std::string text;
  std::vector<char> block(1 << 20);
  while (true) {
    const ssize_t got = ::pread(fd, block.data(), block.size(), static_cast<off_t>(text.size()));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return SystemError(absl::StrCat("cannot read ", path), errno);
    if (got == 0) return text;
    text.append(block.data(), static_cast<size_t>(got));
  }
}

// JSON has no NaN and no infinity; the library would write null in their place.
absl::Status CheckFinite(const ordered_json& value, const std::string& path) {
  if (value.is_number_float() && !std::isfinite(value.get<double>())) {
    return absl::InvalidArgumentError(
        absl::StrCat("the record's ", path, " is not a finite number"));
  }
  if (value.is_structured()) {
    for (const auto& [key, item] : value.items()) {
      RETURN_IF_ERROR(CheckFinite(item, path.empty() ? key : absl::StrCat(path, ".", key)));
    }
  }
  return absl::OkStatus();
}

// Text that is not UTF-8 (a token limit may cut a character) is written with U+FFFD in place of it.
std::string Dump(const ordered_json& value) {
  return value.dump(-1, ' ', /*ensure_ascii=*/false, ordered_json::error_handler_t::replace);
}

ordered_json ConfigJson(const ExperimentConfig& config) {
  ordered_json out = ordered_json::object();
  for (const ConfigKey& key : ConfigKeys()) {
    std::visit([&](auto member) { out[key.name] = config.*member; }, key.member);
  }
  return out;
}

ordered_json CountsJson(const std::vector<NodeCounts>& counts) {
  ordered_json out = ordered_json::array();
  for (const NodeCounts& c : counts) {
    out.push_back({{"rounds", c.rounds}, {"proposed", c.proposed}, {"accepted", c.accepted}});
  }
  return out;
}

std::vector<NodeCounts> CountsFrom(const json& in) {
  std::vector<NodeCounts> counts;
  for (const json& c : in) {
    counts.push_back({c.at("rounds").get<int64_t>(), c.at("proposed").get<int64_t>(),
                      c.at("accepted").get<int64_t>()});
  }
  return counts;
}

double UnixTime() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

int64_t QuestionRecord::tokens() const {
  int64_t sum = 0;
  for (const TurnRecord& turn : turns) sum += static_cast<int64_t>(turn.tokens.size());
  return sum;
}

int64_t QuestionRecord::rounds() const {
  int64_t sum = 0;
  for (const TurnRecord& turn : turns) sum += static_cast<int64_t>(turn.accept_lengths.size());
  return sum;
}

PhaseSeconds QuestionRecord::seconds() const {
  PhaseSeconds sum;
  for (const TurnRecord& turn : turns) sum += turn.seconds;
  return sum;
}

absl::StatusOr<std::string> RecordLine(const QuestionRecord& record, const RecordContext& context) {
  ordered_json out;
  out["schema"] = kRecordSchema;
  out["run"] = record.run;
  out["arm"] = record.arm;
  out["repetition"] = record.repetition;
  out["question_id"] = record.question_id;
  out["category"] = record.category;
  out["error"] = record.error.empty() ? ordered_json(nullptr) : ordered_json(record.error);
  ordered_json turns = ordered_json::array();
  for (const TurnRecord& turn : record.turns) {
    const PhaseSeconds& s = turn.seconds;
    turns.push_back({{"prompt_tokens", turn.prompt_tokens},
                     {"tokens", turn.tokens},
                     {"text", turn.text},
                     {"finish", turn.finish},
                     {"accept_lengths", turn.accept_lengths},
                     {"seconds",
                      {{"prefill", s.prefill},
                       {"draft", s.draft},
                       {"verify", s.verify},
                       {"accept", s.accept},
                       {"commit", s.commit},
                       {"total", s.total},
                       {"device", s.device}}}});
  }
  out["turns"] = std::move(turns);
  out["by_depth"] = CountsJson(record.by_depth);
  out["by_rank"] = CountsJson(record.by_rank);
  out["bytes"] = {{"checkpoint", record.state.checkpoint},
                  {"ring", record.state.ring},
                  {"kv_per_position", record.state.kv_per_position},
                  {"pending_per_node", record.state.pending_per_node},
                  {"state_total", record.state.total},
                  {"max_pending_nodes", record.state.max_pending_nodes},
                  {"drafter", context.draft_bytes}};
  out["seed"] = context.config.sampling_seed;
  out["device"] = context.device;
  out["dtype"] = {{"target", context.target_dtype}, {"draft", context.draft_dtype}};
  out["checkpoints"] = {{"target", context.target_hash}, {"draft", context.draft_hash}};
  out["canopy"] = {{"version", kVersion}, {"revision", GitRevision()}};
  out["time"] = UnixTime();
  out["config"] = ConfigJson(context.config);
  RETURN_IF_ERROR(CheckFinite(out, ""));
  return Dump(out);
}

absl::StatusOr<QuestionRecord> ParseRecordLine(std::string_view line, RecordContext* context) {
  QuestionRecord record;
  try {
    const json in = json::parse(line.begin(), line.end());
    const int schema = in.at("schema").get<int>();
    if (schema != kRecordSchema) {
      return absl::InvalidArgumentError(absl::StrCat("the record has schema version ", schema,
                                                     ", and this is version ", kRecordSchema));
    }
    in.at("run").get_to(record.run);
    in.at("arm").get_to(record.arm);
    in.at("repetition").get_to(record.repetition);
    in.at("question_id").get_to(record.question_id);
    in.at("category").get_to(record.category);
    if (!in.at("error").is_null()) in.at("error").get_to(record.error);
    for (const json& t : in.at("turns")) {
      TurnRecord turn;
      t.at("prompt_tokens").get_to(turn.prompt_tokens);
      t.at("tokens").get_to(turn.tokens);
      t.at("text").get_to(turn.text);
      t.at("finish").get_to(turn.finish);
      t.at("accept_lengths").get_to(turn.accept_lengths);
      const json& s = t.at("seconds");
      turn.seconds = {s.at("prefill").get<double>(), s.at("draft").get<double>(),
                      s.at("verify").get<double>(),  s.at("accept").get<double>(),
                      s.at("commit").get<double>(),  s.at("total").get<double>(),
                      s.value("device", 0.0)};
      record.turns.push_back(std::move(turn));
    }
    record.by_depth = CountsFrom(in.at("by_depth"));
    record.by_rank = CountsFrom(in.at("by_rank"));
    const json& bytes = in.at("bytes");
    record.state = {
        bytes.at("checkpoint").get<int64_t>(),      bytes.at("ring").get<int64_t>(),
        bytes.at("kv_per_position").get<int64_t>(), bytes.at("pending_per_node").get<int64_t>(),
        bytes.at("state_total").get<int64_t>(),     bytes.at("max_pending_nodes").get<int64_t>()};
    if (context != nullptr) {
      in.at("device").get_to(context->device);
      in.at("dtype").at("target").get_to(context->target_dtype);
      in.at("dtype").at("draft").get_to(context->draft_dtype);
      in.at("checkpoints").at("target").get_to(context->target_hash);
      in.at("checkpoints").at("draft").get_to(context->draft_hash);
      context->draft_bytes = bytes.at("drafter").get<size_t>();
      const json& config = in.at("config");
      for (const ConfigKey& key : ConfigKeys()) {
        // A key that is younger than the record has its default.
        if (!config.contains(key.name)) continue;
        std::visit([&](auto member) { config.at(key.name).get_to(context->config.*member); },
                   key.member);
      }
    }
  } catch (const json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("not a record: ", error.what()));
  }
  return record;
}

absl::StatusOr<RecordFile> RecordFile::Open(const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    return SystemError(absl::StrCat("cannot make the results folder ", folder), error.value());
  }
  RecordFile file;
  file.path_ = (std::filesystem::path(folder) / "records.jsonl").string();
  file.fd_ = ::open(file.path_.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (file.fd_ < 0) return SystemError(absl::StrCat("cannot write ", file.path_), errno);
  struct stat info;
  if (::fstat(file.fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path_, " is not a regular file; give this run another run.name"));
  }
  if (::flock(file.fd_, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return SystemError(absl::StrCat("cannot lock ", file.path_), errno);
    return absl::FailedPreconditionError(absl::StrCat(
        file.path_, " is in use by another run; wait for it or give this one another run.name"));
  }
  ASSIGN_OR_RETURN(const std::string text, ReadAll(file.fd_, file.path_));
  const size_t whole = text.rfind('\n') == std::string::npos ? 0 : text.rfind('\n') + 1;
  if (whole != text.size()) {
    if (::ftruncate(file.fd_, static_cast<off_t>(whole)) != 0) {
      return SystemError(absl::StrCat("cannot repair ", file.path_), errno);
    }
    file.repaired_ = true;
  }
  file.size_ = static_cast<int64_t>(whole);

  std::map<std::tuple<std::string, int, int64_t>, size_t> seen;
  int number = 0;
  for (size_t begin = 0; begin < whole;) {
    ++number;
    const size_t end = text.find('\n', begin);
    Entry entry;
    absl::StatusOr<QuestionRecord> record =
        ParseRecordLine(std::string_view(text).substr(begin, end - begin), &entry.context);
    if (!record.ok()) {
      return Annotate(record.status(), absl::StrCat(file.path_, ":", number));
    }
    entry.record = *std::move(record);
    begin = end + 1;
    const auto key =
        std::make_tuple(entry.record.run, entry.record.repetition, entry.record.question_id);
    const auto [first, inserted] = seen.emplace(key, file.entries_.size());
    if (inserted) {
      file.entries_.push_back(std::move(entry));
    } else {
      file.entries_[first->second] = std::move(entry);
    }
  }
  return file;
}

RecordFile::RecordFile(RecordFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      size_(other.size_),
      synced_(other.synced_),
      unsynced_(other.unsynced_),
      repaired_(other.repaired_),
      entries_(std::move(other.entries_)) {}

RecordFile::~RecordFile() {
  if (fd_ >= 0) ::close(fd_);
}

absl::Status RecordFile::Append(const QuestionRecord& record, const RecordContext& context) {
  ASSIGN_OR_RETURN(std::string line, RecordLine(record, context));
  line += '\n';
  const int error = WriteAll(fd_, line);
  if (error != 0) {
    if (::ftruncate(fd_, static_cast<off_t>(size_)) != 0) {
      // The rest of a line is then removed when the file is opened again.
    }
    return SystemError(absl::StrCat("cannot write ", path_), error);
  }
  size_ += static_cast<int64_t>(line.size());
  unsynced_ = true;
  if (std::chrono::steady_clock::now() - synced_ < kSyncInterval) return absl::OkStatus();
  return Sync();
}

absl::Status RecordFile::Sync() {
  if (!unsynced_) return absl::OkStatus();
  if (::fsync(fd_) != 0) return SystemError(absl::StrCat("cannot write ", path_), errno);
  unsynced_ = false;
  synced_ = std::chrono::steady_clock::now();
  return absl::OkStatus();
}

absl::Status WriteWhole(const std::string& path, std::string_view text) {
  const std::string temporary = path + ".new";
  const int fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return SystemError(absl::StrCat("cannot write ", temporary), errno);
  int error = WriteAll(fd, text);
  if (error == 0 && ::fsync(fd) != 0) error = errno;
  if (::close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && ::rename(temporary.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) {
    ::unlink(temporary.c_str());
    return SystemError(absl::StrCat("cannot write ", path), error);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> SpecBenchAnswers(std::span<const QuestionRecord* const> records,
                                             const std::string& model_id) {
  std::vector<const QuestionRecord*> ordered;
  for (const QuestionRecord* record : records) {
    if (record->ok()) ordered.push_back(record);
  }
  std::sort(ordered.begin(), ordered.end(), [](const QuestionRecord* a, const QuestionRecord* b) {
    return a->question_id < b->question_id;
  });
  const double now = UnixTime();
  std::string text;
  for (const QuestionRecord* record : ordered) {
    ordered_json choice = {{"index", 0},
                           {"turns", ordered_json::array()},
                           {"decoding_steps", ordered_json::array()},
                           {"new_tokens", ordered_json::array()},
                           {"wall_time", ordered_json::array()},
                           {"accept_lengths", ordered_json::array()}};
    for (const TurnRecord& turn : record->turns) {
      choice["turns"].push_back(turn.text);
      choice["decoding_steps"].push_back(turn.accept_lengths.size());
      choice["new_tokens"].push_back(turn.tokens.size());
      choice["wall_time"].push_back(turn.seconds.total);
      for (int32_t length : turn.accept_lengths) choice["accept_lengths"].push_back(length);
    }
    ordered_json answer = {
        {"question_id", record->question_id},
        {"category", record->category},
        {"answer_id", absl::StrCat(record->run, "-", record->question_id, "-", record->repetition)},
        {"model_id", model_id},
        {"choices", ordered_json::array({std::move(choice)})},
        {"tstamp", now}};
    RETURN_IF_ERROR(CheckFinite(answer, ""));
    absl::StrAppend(&text, Dump(answer), "\n");
  }
  return text;
}

}  // namespace canopy
