// A stretch of text on its way through a tokenizer.

#ifndef CANOPY_CORE_TOKENIZATION_PIECE_H_
#define CANOPY_CORE_TOKENIZATION_PIECE_H_

#include <string>
#include <utility>
#include <vector>

#include "trees/ids.h"

namespace canopy {

struct Piece {
  std::string text;           // valid UTF-8; of no meaning where `token` is set
  bool at_text_start = true;  // its first character comes from the input's first
  TokenId token = TokenId();  // an added token that was found in the text, or -1

  bool is_token() const { return token.value >= 0; }
};

// Pieces of at least one character, in the order of the text.
using Pieces = std::vector<Piece>;

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_PIECE_H_
