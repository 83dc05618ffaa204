// Reads the small text forms of this folder, with errors that name the character.

#ifndef CANOPY_TREES_TEXT_CURSOR_H_
#define CANOPY_TREES_TEXT_CURSOR_H_

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace canopy {

// A position in a text. Blanks before each part are skipped. `text` must outlive the cursor.
class TextCursor {
 public:
  // `what` begins every error: "tree shape".
  TextCursor(const char* what, std::string_view text) : what_(what), text_(text) { SkipBlanks(); }

  size_t position() const { return position_; }
  bool AtEnd() const { return position_ == text_.size(); }

  bool Consume(char c) {
    if (AtEnd() || text_[position_] != c) return false;
    ++position_;
    SkipBlanks();
    return true;
  }

  bool ConsumeWord(std::string_view word) {
    if (text_.substr(position_, word.size()) != word) return false;
    position_ += word.size();
    SkipBlanks();
    return true;
  }

  // A decimal number from min to max.
  absl::StatusOr<int> Number(int min, int max) {
    const size_t start = position_;
    long long value = 0;
    while (!AtEnd() && text_[position_] >= '0' && text_[position_] <= '9') {
      if (value <= max) value = value * 10 + (text_[position_] - '0');
      ++position_;
    }
    if (position_ == start || value < min || value > max) {
      return ErrorAt(start, absl::StrCat("expected a number from ", min, " to ", max));
    }
    SkipBlanks();
    return static_cast<int>(value);
  }

  absl::Status Error(const std::string& problem) const { return ErrorAt(position_, problem); }

  // Characters are counted from 1.
  absl::Status ErrorAt(size_t position, const std::string& problem) const {
    // Long texts are cut so that an error stays one readable line.
    constexpr size_t kShown = 80;
    std::string shown(text_.substr(0, kShown));
    if (text_.size() > kShown) shown += "...";
    return absl::InvalidArgumentError(absl::StrCat(
        what_, " \"", shown, "\": ", problem, " at character ", position + 1,
        position < text_.size() ? absl::StrCat(", found '", std::string(1, text_[position]), "'")
                                : std::string(", found the end")));
  }

 private:
  void SkipBlanks() {
    while (!AtEnd() && (text_[position_] == ' ' || text_[position_] == '\t')) ++position_;
  }

  const char* what_;
  std::string_view text_;
  size_t position_ = 0;
};

}  // namespace canopy

#endif  // CANOPY_TREES_TEXT_CURSOR_H_
