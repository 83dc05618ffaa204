#include "experiments/report.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "experiments/suite.h"

namespace canopy {
namespace {

constexpr char kOverall[] = "overall";
// Depths and ranks that the terminal shows; the CSV has all.
constexpr size_t kShownLevels = 12;

using Key = std::pair<int, int64_t>;  // repetition, question

// tokens / second of each question, and the sums, of one repetition.
struct Rates {
  double sum = 0;
  int questions = 0;
  double tokens = 0;
  double seconds = 0;

  void Add(const QuestionRecord& record) {
    const double time = record.seconds().total;
    if (time <= 0) return;
    sum += static_cast<double>(record.tokens()) / time;
    ++questions;
    tokens += static_cast<double>(record.tokens());
    seconds += time;
  }
  double mean() const { return sum / questions; }
  double weighted() const { return tokens / seconds; }
};

std::map<Key, const QuestionRecord*> ByKey(std::span<const QuestionRecord* const> records) {
  std::map<Key, const QuestionRecord*> by_key;
  for (const QuestionRecord* record : records) {
    by_key[{record->repetition, record->question_id}] = record;
  }
  return by_key;
}

CategoryRow MakeRow(const std::string& category, std::span<const QuestionRecord* const> records,
                    const std::map<Key, const QuestionRecord*>& baseline, bool compare) {
  CategoryRow row;
  row.category = category;
  std::set<int64_t> answered;
  std::set<int64_t> failed;
  std::map<int, Rates> all, paired, paired_baseline;  // by repetition
  for (const QuestionRecord* record : records) {
    if (!record->ok()) {
      failed.insert(record->question_id);
      continue;
    }
    answered.insert(record->question_id);
    row.tokens += record->tokens();
    row.rounds += record->rounds();
    all[record->repetition].Add(*record);
    const auto other = baseline.find({record->repetition, record->question_id});
    if (compare && other != baseline.end() && other->second->ok()) {
      paired[record->repetition].Add(*record);
      paired_baseline[record->repetition].Add(*other->second);
    }
  }
  row.questions = static_cast<int>(answered.size());
  row.failed = static_cast<int>(failed.size());
  row.mat = row.rounds == 0 ? 0 : static_cast<double>(row.tokens) / row.rounds;
  std::vector<double> rate, weighted;
  for (const auto& [repetition, rates] : all) {
    if (rates.questions == 0) continue;
    rate.push_back(rates.mean());
    weighted.push_back(rates.weighted());
  }
  row.rate = SpreadOf(rate);
  row.weighted_rate = SpreadOf(weighted);
  std::vector<double> base_rate, base_weighted, speedup, weighted_speedup;
  for (const auto& [repetition, rates] : paired) {
    const Rates& base = paired_baseline[repetition];
    if (rates.questions == 0 || base.questions == 0) continue;
    base_rate.push_back(base.mean());
    base_weighted.push_back(base.weighted());
    if (base.tokens == 0) continue;
    speedup.push_back(rates.mean() / base.mean());
    weighted_speedup.push_back(rates.weighted() / base.weighted());
  }
  if (!base_rate.empty()) {
    row.baseline_rate = SpreadOf(base_rate);
    row.baseline_weighted_rate = SpreadOf(base_weighted);
  }
  if (!speedup.empty()) {
    row.speedup = SpreadOf(speedup);
    row.weighted_speedup = SpreadOf(weighted_speedup);
  }
  return row;
}

// Where two answers to a question part, in words; empty if they are the same.
std::string Difference(const QuestionRecord& a, const QuestionRecord& b) {
  for (size_t t = 0; t < std::max(a.turns.size(), b.turns.size()); ++t) {
    if (t >= a.turns.size() || t >= b.turns.size()) {
      return absl::StrCat("question ", a.question_id, " has ", a.turns.size(), " turns against ",
                          b.turns.size());
    }
    const std::vector<int32_t>& x = a.turns[t].tokens;
    const std::vector<int32_t>& y = b.turns[t].tokens;
    if (x == y) continue;
    const size_t at = std::mismatch(x.begin(), x.end(), y.begin(), y.end()).first - x.begin();
    const auto token = [at](const std::vector<int32_t>& ids) {
      return at < ids.size() ? absl::StrCat(ids[at]) : std::string("the end");
    };
    return absl::StrCat("question ", a.question_id, ", turn ", t + 1, ", token ", at, ": ",
                        token(x), " where plain decoding has ", token(y));
  }
  return "";
}

void AddCounts(std::vector<NodeCounts>* sum, const std::vector<NodeCounts>& counts) {
  if (sum->size() < counts.size()) sum->resize(counts.size());
  for (size_t i = 0; i < counts.size(); ++i) (*sum)[i] += counts[i];
}

std::string SpreadText(const Spread& spread, int digits) {
  if (spread.repetitions == 0) return "-";
  std::string text = absl::StrFormat("%.*f", digits, spread.mean);
  if (spread.repetitions > 1) {
    absl::StrAppend(&text, absl::StrFormat(" ±%.*f", digits, spread.deviation));
  }
  return text;
}

std::string SpeedupText(const std::optional<Spread>& spread) {
  if (!spread) return "-";
  std::string text = absl::StrFormat("%.2fx", spread->mean);
  if (spread->repetitions > 1) absl::StrAppend(&text, absl::StrFormat(" ±%.2f", spread->deviation));
  return text;
}

// Width on the terminal: code points, which is right for the one non-ASCII character used here.
size_t Width(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; });
}

// Rows of cells with a line under the first; the first `left` columns are flush left.
std::string Table(const std::vector<std::vector<std::string>>& rows, size_t left) {
  std::vector<size_t> width;
  for (const auto& row : rows) {
    width.resize(std::max(width.size(), row.size()));
    for (size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], Width(row[c]));
  }
  std::string text;
  for (size_t r = 0; r < rows.size(); ++r) {
    std::string line = "  ";
    for (size_t c = 0; c < rows[r].size(); ++c) {
      const std::string padding(width[c] - Width(rows[r][c]), ' ');
      absl::StrAppend(&line, c < left ? rows[r][c] : padding, c < left ? padding : rows[r][c],
                      "  ");
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
    if (r == 0) {
      size_t total = 0;
      for (size_t w : width) total += w + 2;
      absl::StrAppend(&text, "  ", std::string(total - 2, '-'), "\n");
    }
  }
  return text;
}

std::string Percent(double part, double whole) {
  return whole <= 0 ? "-" : absl::StrFormat("%.1f%%", 100 * part / whole);
}

std::string CountsText(const std::vector<NodeCounts>& counts, int first, const char* what) {
  std::string text = absl::StrCat("  accepted/proposed by ", what, ":");
  bool any = false;
  for (size_t i = 0; i < counts.size() && i < kShownLevels; ++i) {
    if (counts[i].proposed == 0) continue;
    any = true;
    absl::StrAppend(&text, "  ", first + static_cast<int>(i), ": ",
                    Percent(static_cast<double>(counts[i].accepted), counts[i].proposed), " (",
                    counts[i].accepted, "/", counts[i].proposed, ")");
  }
  return any ? text + "\n" : "";
}

std::string CsvField(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string quoted = "\"";
  for (char c : text) {
    quoted += c;
    if (c == '"') quoted += '"';
  }
  return quoted + "\"";
}

std::string GateText(const CorrectnessGate& gate) {
  if (!gate.applies) return "sampled";
  if (gate.red()) return "NO";
  return gate.compared > 0 ? "yes" : "-";
}

}  // namespace

Spread SpreadOf(std::span<const double> values) {
  Spread spread;
  spread.repetitions = static_cast<int>(values.size());
  if (values.empty()) return spread;
  for (double value : values) spread.mean += value;
  spread.mean /= static_cast<double>(values.size());
  if (values.size() > 1) {
    double squares = 0;
    for (double value : values) squares += (value - spread.mean) * (value - spread.mean);
    spread.deviation = std::sqrt(squares / static_cast<double>(values.size() - 1));
  }
  return spread;
}

ArmReport MakeArmReport(const ArmRecords& arm) {
  ArmReport report;
  report.name = arm.name;
  report.is_baseline = arm.is_baseline;
  report.axes = arm.axes;
  const std::map<Key, const QuestionRecord*> baseline = ByKey(arm.baseline);
  const bool compare = !arm.is_baseline && !baseline.empty();

  std::vector<std::string> categories;  // in the order of the first record of each
  std::map<std::string, std::vector<const QuestionRecord*>> by_category;
  for (const QuestionRecord* record : arm.records) {
    std::string category = PooledCategory(record->category);
    auto& list = by_category[category];
    if (list.empty()) categories.push_back(category);
    list.push_back(record);
    if (!record->ok()) continue;
    AddCounts(&report.by_depth, record->by_depth);
    AddCounts(&report.by_rank, record->by_rank);
    report.seconds += record->seconds();
  }
  for (const std::string& category : categories) {
    report.rows.push_back(MakeRow(category, by_category[category], baseline, compare));
  }
  report.rows.push_back(MakeRow(kOverall, arm.records, baseline, compare));

  report.gate.applies = compare && arm.must_equal_baseline;
  if (report.gate.applies) {
    for (const QuestionRecord* record : arm.records) {
      const auto other = baseline.find({record->repetition, record->question_id});
      if (!record->ok() || other == baseline.end() || !other->second->ok()) continue;
      ++report.gate.compared;
      const std::string difference = Difference(*record, *other->second);
      if (difference.empty()) continue;
      if (report.gate.different++ == 0) report.gate.first = difference;
    }
  }
  if (report.gate.red()) {
    for (CategoryRow& row : report.rows) {
      row.speedup.reset();
      row.weighted_speedup.reset();
    }
  }
  return report;
}

std::string ArmTable(const ArmReport& report) {
  std::string text = absl::StrCat(report.name, "\n");
  if (report.rows.empty()) return text;
  const bool compared = report.overall().baseline_rate.has_value();
  const bool failures = report.failed() > 0;
  std::vector<std::vector<std::string>> rows;
  rows.push_back({"category", "questions", "tokens", "MAT", "tokens/s", "weighted"});
  if (compared) {
    rows[0].insert(rows[0].end(), {"baseline", "weighted", "speed-up", "weighted"});
  }
  if (failures) rows[0].push_back("failed");
  for (const CategoryRow& row : report.rows) {
    rows.push_back({row.category, absl::StrCat(row.questions), absl::StrCat(row.tokens),
                    row.rounds == 0 ? "-" : absl::StrFormat("%.2f", row.mat),
                    SpreadText(row.rate, 1), SpreadText(row.weighted_rate, 1)});
    if (compared) {
      rows.back().insert(
          rows.back().end(),
          {row.baseline_rate ? SpreadText(*row.baseline_rate, 1) : "-",
           row.baseline_weighted_rate ? SpreadText(*row.baseline_weighted_rate, 1) : "-",
           SpeedupText(row.speedup), SpeedupText(row.weighted_speedup)});
    }
    if (failures) rows.back().push_back(absl::StrCat(row.failed));
  }
  absl::StrAppend(&text, Table(rows, 1));
  absl::StrAppend(&text, CountsText(report.by_depth, 1, "depth"));
  absl::StrAppend(&text, CountsText(report.by_rank, 0, "sibling rank"));
  const PhaseSeconds& s = report.seconds;
  const double rest = s.total - s.prefill - s.draft - s.verify - s.accept - s.commit;
  absl::StrAppend(&text, "  time: prompt ", Percent(s.prefill, s.total), ", draft ",
                  Percent(s.draft, s.total), ", verify ", Percent(s.verify, s.total), ", accept ",
                  Percent(s.accept, s.total), ", commit ", Percent(s.commit, s.total), ", rest ",
                  Percent(rest, s.total), "\n");
  if (s.device > 0) {
    absl::StrAppend(&text, "  the device was at work in ", Percent(s.device, s.rounds()),
                    " of the time of draft, verify, accept and commit\n");
  }
  const CorrectnessGate& gate = report.gate;
  if (gate.red()) {
    absl::StrAppend(&text, "  NOT EQUAL to plain decoding in ", gate.different, " of ",
                    gate.compared, " answers, so no speed-up is shown; first at ", gate.first,
                    "\n");
  } else if (gate.applies && gate.compared > 0) {
    absl::StrAppend(&text, "  token ids equal plain decoding's in all ", gate.compared,
                    " answers\n");
  } else if (compared && !gate.applies) {
    absl::StrAppend(
        &text, "  sampled: the text differs from plain decoding's, its distribution does not\n");
  }
  return text;
}

std::string ComparisonTable(std::span<const ArmReport> reports) {
  std::vector<std::vector<std::string>> rows(1);
  rows[0].push_back("run");
  rows[0].insert(rows[0].end(),
                 {"questions", "MAT", "tokens/s", "baseline", "speed-up", "weighted", "equal"});
  const ArmReport* best = nullptr;
  for (const ArmReport& report : reports) {
    if (report.is_baseline || report.rows.empty() || !report.overall().speedup) continue;
    if (best == nullptr || report.overall().speedup->mean > best->overall().speedup->mean) {
      best = &report;
    }
  }
  for (const ArmReport& report : reports) {
    if (report.rows.empty()) continue;
    const CategoryRow& row = report.overall();
    rows.push_back(
        {absl::StrCat(report.name, &report == best ? " *" : ""), absl::StrCat(row.questions),
         row.rounds == 0 ? "-" : absl::StrFormat("%.2f", row.mat), SpreadText(row.rate, 1),
         row.baseline_rate ? SpreadText(*row.baseline_rate, 1) : "-", SpeedupText(row.speedup),
         SpeedupText(row.weighted_speedup), report.is_baseline ? "" : GateText(report.gate)});
  }
  return Table(rows, 1) + (best == nullptr ? "" : "  * highest speed-up\n");
}

std::string ReportCsv(std::span<const ArmReport> reports) {
  std::vector<std::string> header = {"arm"};
  std::vector<std::string> axes;
  size_t depths = 0;
  size_t ranks = 0;
  for (const ArmReport& report : reports) {
    for (const auto& [key, value] : report.axes) {
      if (std::find(axes.begin(), axes.end(), key) == axes.end()) axes.push_back(key);
    }
    depths = std::max(depths, report.by_depth.size());
    ranks = std::max(ranks, report.by_rank.size());
  }
  header.insert(header.end(), axes.begin(), axes.end());
  for (const char* name :
       {"category", "questions", "failed", "tokens", "rounds", "mat", "tokens_per_second",
        "tokens_per_second_deviation", "weighted_tokens_per_second", "baseline_tokens_per_second",
        "baseline_weighted_tokens_per_second", "speedup", "speedup_deviation", "weighted_speedup",
        "repetitions", "equal_to_baseline"}) {
    header.push_back(name);
  }
  // Counts and phases are of the whole arm and stand in its "overall" row.
  for (const char* name : {"prefill", "draft", "verify", "accept", "commit", "total", "device"}) {
    header.push_back(absl::StrCat(name, "_seconds"));
  }
  for (size_t i = 0; i < depths; ++i) {
    for (const char* name : {"rounds", "proposed", "accepted"}) {
      header.push_back(absl::StrCat("depth", i + 1, "_", name));
    }
  }
  for (size_t i = 0; i < ranks; ++i) {
    for (const char* name : {"rounds", "proposed", "accepted"}) {
      header.push_back(absl::StrCat("rank", i, "_", name));
    }
  }
  std::string text = absl::StrCat(absl::StrJoin(header, ","), "\n");
  const auto number = [](double value) { return absl::StrFormat("%.6g", value); };
  const auto mean = [&](const std::optional<Spread>& s) { return s ? number(s->mean) : ""; };
  for (const ArmReport& report : reports) {
    for (const CategoryRow& row : report.rows) {
      std::vector<std::string> fields = {CsvField(report.name)};
      for (const std::string& axis : axes) {
        const auto found = std::find_if(report.axes.begin(), report.axes.end(),
                                        [&](const auto& pair) { return pair.first == axis; });
        fields.push_back(found == report.axes.end() ? "" : CsvField(found->second));
      }
      for (const std::string& field : std::initializer_list<std::string>{
               CsvField(row.category), absl::StrCat(row.questions), absl::StrCat(row.failed),
               absl::StrCat(row.tokens), absl::StrCat(row.rounds), number(row.mat),
               row.rate.repetitions ? number(row.rate.mean) : "",
               row.rate.repetitions > 1 ? number(row.rate.deviation) : "",
               row.rate.repetitions ? number(row.weighted_rate.mean) : "", mean(row.baseline_rate),
               mean(row.baseline_weighted_rate), mean(row.speedup),
               row.speedup && row.speedup->repetitions > 1 ? number(row.speedup->deviation) : "",
               mean(row.weighted_speedup), absl::StrCat(row.rate.repetitions),
               report.is_baseline ? "" : GateText(report.gate)}) {
        fields.push_back(field);
      }
      if (row.category == kOverall) {
        const PhaseSeconds& s = report.seconds;
        for (double value : {s.prefill, s.draft, s.verify, s.accept, s.commit, s.total, s.device}) {
          fields.push_back(number(value));
        }
        const auto counts = [&](const std::vector<NodeCounts>& list, size_t size) {
          for (size_t i = 0; i < size; ++i) {
            const NodeCounts c = i < list.size() ? list[i] : NodeCounts();
            fields.push_back(absl::StrCat(c.rounds));
            fields.push_back(absl::StrCat(c.proposed));
            fields.push_back(absl::StrCat(c.accepted));
          }
        };
        counts(report.by_depth, depths);
        counts(report.by_rank, ranks);
      }
      fields.resize(header.size());
      absl::StrAppend(&text, absl::StrJoin(fields, ","), "\n");
    }
  }
  return text;
}

}  // namespace canopy
