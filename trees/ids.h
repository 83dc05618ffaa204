// Strong integer ids: a token of a vocabulary, a node of a token tree.

#ifndef CANOPY_TREES_IDS_H_
#define CANOPY_TREES_IDS_H_

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace canopy {

// An int32 that does not mix with other ids or with plain integers. Same layout as int32_t, so
// arrays of ids can be handed to a device as they are.
template <typename Tag>
struct StrongId {
  int32_t value = -1;

  constexpr StrongId() = default;
  constexpr explicit StrongId(int32_t v) : value(v) {}
  friend constexpr auto operator<=>(const StrongId&, const StrongId&) = default;
};

using TokenId = StrongId<struct TokenIdTag>;

// A token that a device has yet to choose: it stands for a token that LanguageModel::Resolve tells
// later (ForwardItem::promise in core/language_model.h). Below -1, so that it is no token and not
// "none" either. The same promise is the same token.
constexpr bool IsPromised(TokenId token) { return token.value < -1; }

// Index of a node in its tree, or among the pending nodes of a DecodeState. Nodes are numbered in
// the order in which they were added; a parent's number is below its children's.
using NodeId = StrongId<struct NodeIdTag>;

// The parent of a node that hangs under the last token of the committed prefix.
inline constexpr NodeId kPrefix{-1};

}  // namespace canopy

template <typename Tag>
struct std::hash<canopy::StrongId<Tag>> {
  size_t operator()(const canopy::StrongId<Tag>& id) const noexcept {
    return std::hash<int32_t>()(id.value);
  }
};

#endif  // CANOPY_TREES_IDS_H_
