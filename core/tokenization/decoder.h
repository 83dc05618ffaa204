// The "decoder" of tokenizer.json: tokens to text, at once or as they come.

#ifndef CANOPY_CORE_TOKENIZATION_DECODER_H_
#define CANOPY_CORE_TOKENIZATION_DECODER_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "core/status.h"
#include "core/tokenization/json_fields.h"
#include "core/tokenization/pattern.h"

namespace canopy {

// ByteLevel, Metaspace, ByteFallback, Fuse, Replace, Strip and Sequence. Const after loading.
class Decoder {
 public:
  // Null means none: tokens are then joined with spaces. Unimplemented names a type that is not
  // supported.
  static absl::StatusOr<Decoder> FromJson(const Json* json, const std::string& where);

  std::string Decode(std::vector<std::string> tokens) const;

  // The text of a sequence that grows, in whole characters. Text that later tokens could still
  // change is held back. The decoder must outlive it.
  class Stream {
   public:
    explicit Stream(const Decoder& decoder);
    std::string Push(std::string token);
    std::string Finish();

   private:
    // Runs a token through the steps from `step` on, appending to *out.
    void Feed(size_t step, std::string token, std::string* out);
    void FeedText(size_t step, std::string text, std::string* out);
    void FlushBytes(size_t step, std::string* out);

    struct StepState {
      std::string bytes;   // held back
      int64_t tokens = 0;  // that the step has seen
      int stripped = 0;    // characters
      bool past_strip = false;
    };
    const Decoder* decoder_;
    std::vector<StepState> states_;
    std::vector<std::string> all_;  // of decoders that cannot stream
    bool first_ = true;
  };

 private:
  struct ByteLevel {};
  struct ByteFallback {};
  struct Fuse {};
  struct Metaspace {
    char32_t replacement = 0;
    bool drop_first = true;
  };
  struct Replace {
    Pattern pattern;
    std::string content;
  };
  struct Strip {
    char32_t content = 0;
    int start = 0;
    int stop = 0;
  };
  using Step = std::variant<ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip>;
  using Tokens = std::vector<std::string>;

  absl::Status Add(const JsonFields& fields, int depth);
  static Tokens Run(const ByteLevel& step, Tokens tokens);
  static Tokens Run(const ByteFallback& step, Tokens tokens);
  static Tokens Run(const Fuse& step, Tokens tokens);
  static Tokens Run(const Metaspace& step, Tokens tokens);
  static Tokens Run(const Replace& step, Tokens tokens);
  static Tokens Run(const Strip& step, Tokens tokens);

  std::vector<Step> steps_;
  bool present_ = false;    // the file has a decoder
  size_t joined_from_ = 0;  // steps from here on see one token: the whole text
  bool streams_ = true;     // otherwise a stream gives everything at its end
};

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_DECODER_H_
