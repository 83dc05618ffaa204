#include "core/tokenization/pre_tokenizer.h"

#include <utility>

#include "core/tokenization/unicode.h"

namespace canopy {
namespace {

constexpr int kMaxNesting = 16;

// The pattern of GPT-2's encoder.py.
constexpr std::string_view kGpt2Words =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

absl::StatusOr<SplitBehavior> BehaviorOf(const JsonFields& fields, std::string_view if_missing) {
  ASSIGN_OR_RETURN(const std::string name, fields.String("behavior", if_missing));
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  return fields.Error("behavior",
                      absl::StrCat("\"", name,
                                   "\" is not one of Removed, Isolated, MergedWithPrevious, "
                                   "MergedWithNext and Contiguous"));
}

absl::StatusOr<Pattern> Compile(std::string_view regex) {
  ASSIGN_OR_RETURN(Regex compiled, Regex::Compile(regex));
  return Pattern(std::move(compiled));
}

struct Part {
  size_t begin = 0;
  size_t end = 0;
  bool match = false;
};

// Matches and what lies between them, together the whole text.
std::vector<Part> PartsOf(const Pattern& pattern, bool invert, std::string_view text) {
  std::vector<Regex::Match> matches;
  pattern.FindAll(text, &matches);
  std::vector<Part> parts;
  parts.reserve(2 * matches.size() + 1);
  size_t end = 0;
  for (const Regex::Match& match : matches) {
    if (end != match.begin) parts.push_back({end, match.begin, invert});
    parts.push_back({match.begin, match.end, !invert});
    end = match.end;
  }
  if (end != text.size()) parts.push_back({end, text.size(), invert});
  return parts;
}

// Joins neighbours where join(this part, is the neighbour before it a match).
template <typename Join>
std::vector<Part> Joined(const std::vector<Part>& parts, Join join) {
  std::vector<Part> result;
  bool previous = false;
  for (const Part& part : parts) {
    if (!result.empty() && join(part.match, previous)) {
      result.back().end = part.end;
    } else {
      result.push_back(part);
    }
    previous = part.match;
  }
  return result;
}

}  // namespace

absl::StatusOr<PreTokenizer> PreTokenizer::FromJson(const Json* json, const std::string& where) {
  PreTokenizer result;
  if (json == nullptr) return result;
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(*json, where));
  RETURN_IF_ERROR(result.Add(fields, 0));
  return result;
}

absl::Status PreTokenizer::Add(const JsonFields& fields, int depth) {
  ASSIGN_OR_RETURN(const std::string type, fields.String("type"));
  if (type == "Sequence") {
    if (depth >= kMaxNesting) return fields.Error("pretokenizers", "nested too deep");
    ASSIGN_OR_RETURN(const Json* list, fields.Array("pretokenizers"));
    for (size_t i = 0; i < list->size(); ++i) {
      ASSIGN_OR_RETURN(
          const JsonFields each,
          JsonFields::Of((*list)[i], absl::StrCat(fields.Path("pretokenizers"), "[", i, "]")));
      RETURN_IF_ERROR(Add(each, depth + 1));
    }
  } else if (type == "Split") {
    ASSIGN_OR_RETURN(Pattern pattern, Pattern::FromJson(fields, "pattern"));
    ASSIGN_OR_RETURN(const SplitBehavior behavior, BehaviorOf(fields, ""));
    ASSIGN_OR_RETURN(const bool invert, fields.Bool("invert", false));
    steps_.push_back(Split{std::move(pattern), behavior, invert});
  } else if (type == "ByteLevel") {
    ASSIGN_OR_RETURN(Pattern words, Compile(kGpt2Words));
    ByteLevel byte_level{.words = {.pattern = std::move(words)}};
    ASSIGN_OR_RETURN(byte_level.add_prefix_space, fields.Bool("add_prefix_space", true));
    ASSIGN_OR_RETURN(byte_level.use_regex, fields.Bool("use_regex", true));
    steps_.push_back(std::move(byte_level));
  } else if (type == "Digits") {
    ASSIGN_OR_RETURN(const bool individual, fields.Bool("individual_digits", false));
    ASSIGN_OR_RETURN(Pattern number, Compile("\\p{N}"));
    steps_.push_back(Split{std::move(number),
                           individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous,
                           false});
  } else if (type == "Punctuation") {
    ASSIGN_OR_RETURN(const SplitBehavior behavior, BehaviorOf(fields, "Isolated"));
    ASSIGN_OR_RETURN(Pattern punctuation, Compile("[\\p{P}$+<=>\\^`|~]"));
    steps_.push_back(Split{std::move(punctuation), behavior, false});
  } else if (type == "Metaspace") {
    ASSIGN_OR_RETURN(const char32_t replacement, fields.Char("replacement"));
    std::string text;
    AppendChar(replacement, &text);
    Metaspace metaspace{.replacement = text,
                        .words = {Pattern(text), SplitBehavior::kMergedWithNext, false}};
    ASSIGN_OR_RETURN(metaspace.split, fields.Bool("split", true));
    // Older files have add_prefix_space, newer ones prepend_scheme.
    ASSIGN_OR_RETURN(const bool prefix, fields.Bool("add_prefix_space", true));
    ASSIGN_OR_RETURN(const std::string scheme,
                     fields.String("prepend_scheme", prefix ? "always" : "never"));
    if (scheme == "always") {
      metaspace.prepend = Metaspace::Prepend::kAlways;
    } else if (scheme == "first") {
      metaspace.prepend = Metaspace::Prepend::kFirst;
    } else if (scheme == "never") {
      metaspace.prepend = Metaspace::Prepend::kNever;
    } else {
      return fields.Error("prepend_scheme",
                          absl::StrCat("\"", scheme, "\" is not one of always, first and never"));
    }
    if (!prefix && scheme != "never") {
      return fields.Error("add_prefix_space", "false contradicts prepend_scheme");
    }
    steps_.push_back(std::move(metaspace));
  } else {
    return fields.UnknownType(type,
                              "Split, ByteLevel, Metaspace, Digits, Punctuation and Sequence");
  }
  return absl::OkStatus();
}

void PreTokenizer::Apply(Pieces* pieces) const {
  Pieces next;
  for (const Step& step : steps_) {
    next.clear();
    for (Piece& piece : *pieces) {
      if (piece.is_token()) {
        next.push_back(std::move(piece));
      } else {
        std::visit([&](const auto& run) { Run(run, std::move(piece), &next); }, step);
      }
    }
    std::swap(*pieces, next);
  }
}

void PreTokenizer::Cut(const Split& split, Piece piece, Pieces* out) {
  std::vector<Part> parts = PartsOf(split.pattern, split.invert, piece.text);
  switch (split.behavior) {
    case SplitBehavior::kIsolated:
      break;
    case SplitBehavior::kRemoved:
      std::erase_if(parts, [](const Part& part) { return part.match; });
      break;
    case SplitBehavior::kContiguous:
      parts = Joined(parts, [](bool match, bool previous) { return match == previous; });
      break;
    case SplitBehavior::kMergedWithPrevious:
      parts = Joined(parts, [](bool match, bool previous) { return match && !previous; });
      break;
    case SplitBehavior::kMergedWithNext:
      // A match goes to what follows it, unless that is a match too.
      parts = Joined(parts, [](bool match, bool previous) { return previous && !match; });
      break;
  }
  if (parts.size() == 1 && parts[0].begin == 0 && parts[0].end == piece.text.size()) {
    if (!piece.text.empty()) out->push_back(std::move(piece));
    return;
  }
  for (const Part& part : parts) {
    if (part.begin == part.end) continue;
    out->push_back({piece.text.substr(part.begin, part.end - part.begin),
                    piece.at_text_start && part.begin == 0, TokenId()});
  }
}

void PreTokenizer::Run(const Split& split, Piece piece, Pieces* out) {
  Cut(split, std::move(piece), out);
}

void PreTokenizer::Run(const ByteLevel& byte_level, Piece piece, Pieces* out) {
  if (byte_level.add_prefix_space && !piece.text.starts_with(' ')) piece.text.insert(0, 1, ' ');
  const size_t first = out->size();
  if (byte_level.use_regex) {
    Cut(byte_level.words, std::move(piece), out);
  } else {
    out->push_back(std::move(piece));
  }
  std::string mapped;
  for (size_t i = first; i < out->size(); ++i) {
    mapped.clear();
    AppendByteLevel((*out)[i].text, &mapped);
    (*out)[i].text = mapped;
  }
}

void PreTokenizer::Run(const Metaspace& metaspace, Piece piece, Pieces* out) {
  static const Pattern& space = *new Pattern(" ");
  piece.text = space.ReplaceAll(piece.text, metaspace.replacement);
  const bool prepend = metaspace.prepend == Metaspace::Prepend::kAlways ||
                       (metaspace.prepend == Metaspace::Prepend::kFirst && piece.at_text_start);
  if (prepend && !piece.text.starts_with(metaspace.replacement)) {
    piece.text.insert(0, metaspace.replacement);
  }
  if (metaspace.split) {
    Cut(metaspace.words, std::move(piece), out);
  } else {
    out->push_back(std::move(piece));
  }
}

}  // namespace canopy
