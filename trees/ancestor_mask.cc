#include "trees/ancestor_mask.h"

#include <algorithm>

namespace canopy {

void AncestorMask::Assign(std::span<const NodeId> parents) {
  nodes_ = static_cast<int>(parents.size());
  words_ = (nodes_ + 63) / 64;
  bits_.assign(static_cast<size_t>(nodes_) * words_, 0);
  for (int node = 0; node < nodes_; ++node) {
    uint64_t* mask = bits_.data() + static_cast<int64_t>(node) * words_;
    if (parents[node] != kPrefix) std::ranges::copy(row(parents[node]), mask);
    mask[node / 64] |= uint64_t{1} << (node % 64);
  }
}

std::string AncestorMask::ToString() const {
  std::string text;
  for (int node = 0; node < nodes_; ++node) {
    for (int other = 0; other < nodes_; ++other) {
      text += Sees(NodeId(node), NodeId(other)) ? '#' : '.';
    }
    text += '\n';
  }
  return text;
}

}  // namespace canopy
