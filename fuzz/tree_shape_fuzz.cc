// The text forms of tree shapes and token trees: any text is read or refused, and what is read
// comes back the same from its own text.

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "trees/token_tree.h"
#include "trees/tree_shape.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  if (const auto shape = canopy::TreeShape::Parse(text); shape.ok()) {
    const auto again = canopy::TreeShape::Parse(shape->ToString());
    if (!again.ok() || *again != *shape) std::abort();
  }
  if (const auto tree = canopy::TokenTree::Parse(text); tree.ok()) {
    const auto again = canopy::TokenTree::Parse(tree->ToString());
    if (!again.ok() || *again != *tree) std::abort();
  }
  return 0;
}
