#include "core/tokenization/decoder.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <utility>

#include "core/tokenization/unicode.h"

namespace canopy {
namespace {

constexpr int kMaxNesting = 16;
constexpr std::string_view kReplacement = "\xef\xbf\xbd";

// The bytes that a byte-level token stands for: those of its stand-ins, or its own if any character
// is none.
void AppendTokenBytes(std::string_view token, std::string* out) {
  const size_t before = out->size();
  std::string_view rest = token;
  while (!rest.empty()) {
    const int byte = ByteOfStandIn(TakeChar(&rest));
    if (byte < 0) {
      out->resize(before);
      out->append(token);
      return;
    }
    *out += static_cast<char>(byte);
  }
}

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The byte of "<0x41>".
std::optional<char> ByteOf(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  const int low = HexValue(token[4]);
  // Rust's number parser, which `tokenizers` uses, takes a plus sign.
  const int high = token[3] == '+' ? 0 : HexValue(token[3]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<char>(high << 4 | low);
}

// A run of byte tokens is text, or as many U+FFFD as it has bytes.
void AppendByteRun(std::string_view bytes, std::vector<std::string>* tokens) {
  if (bytes.empty()) return;
  if (IsValidUtf8(bytes)) {
    tokens->emplace_back(bytes);
  } else {
    for (size_t i = 0; i < bytes.size(); ++i) tokens->emplace_back(kReplacement);
  }
}

std::string FromMetaspace(std::string_view token, char32_t replacement, bool drop) {
  std::string result;
  while (!token.empty()) {
    const char32_t c = TakeChar(&token);
    if (c != replacement) {
      AppendChar(c, &result);
    } else if (!drop) {
      result += ' ';
    }
  }
  return result;
}

std::string Stripped(std::string_view token, char32_t content, int start, int stop) {
  std::string_view rest = token;
  for (int i = 0; i < start && !rest.empty(); ++i) {
    std::string_view after = rest;
    if (TakeChar(&after) != content) break;
    rest = after;
  }
  std::string suffix;
  AppendChar(content, &suffix);
  for (int i = 0; i < stop && rest.ends_with(suffix); ++i) rest.remove_suffix(suffix.size());
  return std::string(rest);
}

}  // namespace

absl::StatusOr<Decoder> Decoder::FromJson(const Json* json, const std::string& where) {
  Decoder decoder;
  if (json == nullptr) return decoder;
  decoder.present_ = true;
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(*json, where));
  RETURN_IF_ERROR(decoder.Add(fields, 0));

  const auto& steps = decoder.steps_;
  const auto joins = [](const Step& step) {
    return std::holds_alternative<ByteLevel>(step) || std::holds_alternative<Fuse>(step);
  };
  const auto join = std::find_if(steps.begin(), steps.end(), joins);
  decoder.joined_from_ = join == steps.end() ? steps.size() : join - steps.begin() + 1;
  for (size_t i = decoder.joined_from_; i < steps.size(); ++i) {
    const auto* strip = std::get_if<Strip>(&steps[i]);
    const auto* replace = std::get_if<Replace>(&steps[i]);
    const bool one_char = replace != nullptr && replace->pattern.literal() != nullptr &&
                          CountChars(*replace->pattern.literal()) == 1;
    // After the join a step sees the whole text; these need no more of it than the next character.
    const bool streams = std::holds_alternative<Fuse>(steps[i]) ||
                         std::holds_alternative<Metaspace>(steps[i]) ||
                         (strip != nullptr && strip->stop == 0) || one_char;
    decoder.streams_ = decoder.streams_ && streams;
  }
  return decoder;
}

absl::Status Decoder::Add(const JsonFields& fields, int depth) {
  ASSIGN_OR_RETURN(const std::string type, fields.String("type"));
  if (type == "Sequence") {
    if (depth >= kMaxNesting) return fields.Error("decoders", "nested too deep");
    ASSIGN_OR_RETURN(const Json* list, fields.Array("decoders"));
    for (size_t i = 0; i < list->size(); ++i) {
      ASSIGN_OR_RETURN(
          const JsonFields each,
          JsonFields::Of((*list)[i], absl::StrCat(fields.Path("decoders"), "[", i, "]")));
      RETURN_IF_ERROR(Add(each, depth + 1));
    }
  } else if (type == "ByteLevel") {
    steps_.push_back(ByteLevel{});
  } else if (type == "ByteFallback") {
    steps_.push_back(ByteFallback{});
  } else if (type == "Fuse") {
    steps_.push_back(Fuse{});
  } else if (type == "Metaspace") {
    Metaspace step;
    ASSIGN_OR_RETURN(step.replacement, fields.Char("replacement"));
    ASSIGN_OR_RETURN(const bool prefix, fields.Bool("add_prefix_space", true));
    ASSIGN_OR_RETURN(const std::string scheme,
                     fields.String("prepend_scheme", prefix ? "always" : "never"));
    step.drop_first = scheme != "never";
    steps_.push_back(step);
  } else if (type == "Replace") {
    ASSIGN_OR_RETURN(Pattern pattern, Pattern::FromJson(fields, "pattern"));
    ASSIGN_OR_RETURN(std::string content, fields.String("content"));
    steps_.push_back(Replace{std::move(pattern), std::move(content)});
  } else if (type == "Strip") {
    Strip step;
    ASSIGN_OR_RETURN(step.content, fields.Char("content"));
    ASSIGN_OR_RETURN(step.start, fields.Int("start", 0, 1 << 20));
    ASSIGN_OR_RETURN(step.stop, fields.Int("stop", 0, 1 << 20));
    steps_.push_back(step);
  } else {
    return fields.UnknownType(
        type, "ByteLevel, Metaspace, ByteFallback, Fuse, Replace, Strip and Sequence");
  }
  return absl::OkStatus();
}

std::string Decoder::Decode(std::vector<std::string> tokens) const {
  for (const Step& step : steps_) {
    tokens = std::visit([&](const auto& run) { return Run(run, std::move(tokens)); }, step);
  }
  std::string text;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (!present_ && i > 0) text += ' ';
    text += tokens[i];
  }
  return text;
}

Decoder::Tokens Decoder::Run(const ByteLevel&, Tokens tokens) {
  std::string bytes, text;
  for (const std::string& token : tokens) AppendTokenBytes(token, &bytes);
  AppendLossyUtf8(bytes, /*hold=*/false, &text);
  return {text};
}

Decoder::Tokens Decoder::Run(const ByteFallback&, Tokens tokens) {
  Tokens result;
  std::string run;
  for (std::string& token : tokens) {
    if (const std::optional<char> byte = ByteOf(token)) {
      run += *byte;
      continue;
    }
    AppendByteRun(run, &result);
    run.clear();
    result.push_back(std::move(token));
  }
  AppendByteRun(run, &result);
  return result;
}

Decoder::Tokens Decoder::Run(const Fuse&, Tokens tokens) {
  std::string text;
  for (const std::string& token : tokens) text += token;
  return {text};
}

Decoder::Tokens Decoder::Run(const Metaspace& step, Tokens tokens) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = FromMetaspace(tokens[i], step.replacement, i == 0 && step.drop_first);
  }
  return tokens;
}

Decoder::Tokens Decoder::Run(const Replace& step, Tokens tokens) {
  for (std::string& token : tokens) token = step.pattern.ReplaceAll(token, step.content);
  return tokens;
}

Decoder::Tokens Decoder::Run(const Strip& step, Tokens tokens) {
  for (std::string& token : tokens) token = Stripped(token, step.content, step.start, step.stop);
  return tokens;
}

Decoder::Stream::Stream(const Decoder& decoder)
    : decoder_(&decoder), states_(decoder.steps_.size()) {}

std::string Decoder::Stream::Push(std::string token) {
  std::string out;
  if (!decoder_->streams_) {
    all_.push_back(std::move(token));
  } else {
    if (!decoder_->present_ && !first_) out += ' ';
    first_ = false;
    Feed(0, std::move(token), &out);
  }
  return out;
}

void Decoder::Stream::Feed(size_t step, std::string token, std::string* out) {
  for (; step < decoder_->steps_.size(); ++step) {
    const Step& current = decoder_->steps_[step];
    StepState& state = states_[step];
    if (std::holds_alternative<ByteLevel>(current)) {
      AppendTokenBytes(token, &state.bytes);
      std::string text;
      state.bytes.erase(0, AppendLossyUtf8(state.bytes, /*hold=*/true, &text));
      return FeedText(step + 1, std::move(text), out);
    }
    if (std::holds_alternative<Fuse>(current)) return FeedText(step + 1, std::move(token), out);
    if (std::holds_alternative<ByteFallback>(current)) {
      if (const std::optional<char> byte = ByteOf(token)) {
        state.bytes += *byte;
        return;
      }
      FlushBytes(step, out);
    } else if (const auto* metaspace = std::get_if<Metaspace>(&current)) {
      token = FromMetaspace(token, metaspace->replacement,
                            state.tokens++ == 0 && metaspace->drop_first);
    } else if (const auto* replace = std::get_if<Replace>(&current)) {
      token = replace->pattern.ReplaceAll(token, replace->content);
    } else if (const auto* strip = std::get_if<Strip>(&current)) {
      token = Stripped(token, strip->content, strip->start, strip->stop);
    }
  }
  out->append(token);
}

void Decoder::Stream::FeedText(size_t step, std::string text, std::string* out) {
  for (; step < decoder_->steps_.size(); ++step) {
    const Step& current = decoder_->steps_[step];
    if (const auto* metaspace = std::get_if<Metaspace>(&current)) {
      text = FromMetaspace(text, metaspace->replacement, metaspace->drop_first);
    } else if (const auto* replace = std::get_if<Replace>(&current)) {
      text = replace->pattern.ReplaceAll(text, replace->content);
    } else if (const auto* strip = std::get_if<Strip>(&current)) {
      StepState& state = states_[step];
      std::string_view rest = text;
      while (!rest.empty() && !state.past_strip && state.stripped < strip->start) {
        std::string_view after = rest;
        if (TakeChar(&after) == strip->content) {
          ++state.stripped;
          rest = after;
        } else {
          state.past_strip = true;
        }
      }
      text = std::string(rest);
    }
  }
  out->append(text);
}

void Decoder::Stream::FlushBytes(size_t step, std::string* out) {
  Tokens tokens;
  AppendByteRun(states_[step].bytes, &tokens);
  states_[step].bytes.clear();
  for (std::string& token : tokens) Feed(step + 1, std::move(token), out);
}

std::string Decoder::Stream::Finish() {
  if (!decoder_->streams_) return decoder_->Decode(std::exchange(all_, {}));
  std::string out;
  for (size_t i = 0; i < decoder_->steps_.size(); ++i) {
    if (std::holds_alternative<ByteFallback>(decoder_->steps_[i])) FlushBytes(i, &out);
    if (std::holds_alternative<ByteLevel>(decoder_->steps_[i])) {
      std::string text;
      AppendLossyUtf8(std::exchange(states_[i].bytes, {}), /*hold=*/false, &text);
      FeedText(i + 1, std::move(text), &out);
    }
  }
  return out;
}

}  // namespace canopy
