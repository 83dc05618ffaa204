#include "trees/tree_shape.h"

#include <algorithm>

#include "trees/text_cursor.h"

namespace canopy {
namespace {

constexpr char kWhat[] = "tree shape";

std::string TooLarge() {
  return absl::StrCat("more than ", kMaxShapeNodes, " nodes; expected a smaller shape");
}

}  // namespace

void TreeShape::Add(NodeId parent) {
  const NodeId node(size());
  parents_.push_back(parent);
  children_.push_back(0);
  first_child_.push_back(kPrefix);
  if (parent == kPrefix) {
    ranks_.push_back(0);
    depths_.push_back(0);
    return;
  }
  int& siblings = children_[parent.value];
  if (siblings == 0) first_child_[parent.value] = node;
  ranks_.push_back(siblings++);
  depths_.push_back(depths_[parent.value] + 1);
}

int TreeShape::max_children() const { return *std::ranges::max_element(children_); }

TreeShape TreeShape::Chain(int drafted) {
  TreeShape shape;
  for (int node = 0; node <= drafted; ++node) shape.Add(NodeId(node - 1));
  return shape;
}

TreeShape TreeShape::TopK(std::span<const int> children_by_level) {
  TreeShape shape;
  shape.Add(kPrefix);
  int level_begin = 0;
  for (const int children : children_by_level) {
    const int level_end = shape.size();
    for (int node = level_begin; node < level_end; ++node) {
      for (int rank = 0; rank < children; ++rank) shape.Add(NodeId(node));
    }
    level_begin = level_end;
  }
  return shape;
}

absl::StatusOr<TreeShape> TreeShape::Parse(std::string_view text) {
  TextCursor cursor(kWhat, text);
  if (cursor.ConsumeWord("chain:")) {
    absl::StatusOr<int> drafted = cursor.Number(0, kMaxShapeNodes - 1);
    if (!drafted.ok()) return drafted.status();
    if (!cursor.AtEnd()) return cursor.Error("expected the end");
    return Chain(*drafted);
  }
  if (cursor.ConsumeWord("topk:")) {
    std::vector<int> children_by_level;
    int64_t width = 1;
    int64_t nodes = 1;
    do {
      const size_t start = cursor.position();
      absl::StatusOr<int> children = cursor.Number(1, kMaxShapeNodes - 1);
      if (!children.ok()) return children.status();
      width *= *children;
      nodes += width;
      if (nodes > kMaxShapeNodes) return cursor.ErrorAt(start, TooLarge());
      children_by_level.push_back(*children);
    } while (cursor.Consume(','));
    if (!cursor.AtEnd()) return cursor.Error("expected ',' or the end");
    return TopK(children_by_level);
  }

  // Brackets, in the order in which they open: the parent of each.
  std::vector<int> opened_parents;
  int open = -1;
  if (!cursor.Consume('(')) return cursor.Error("expected \"chain:\", \"topk:\" or '('");
  opened_parents.push_back(open);
  open = 0;
  bool node_may_open = true;  // after '(' or ','
  bool after_comma = false;
  while (open >= 0) {
    if (static_cast<int>(opened_parents.size()) > kMaxShapeNodes) return cursor.Error(TooLarge());
    if (node_may_open && cursor.Consume('(')) {
      opened_parents.push_back(open);
      open = static_cast<int>(opened_parents.size()) - 1;
      after_comma = false;
    } else if (!after_comma && cursor.Consume(')')) {
      open = opened_parents[open];
      node_may_open = false;
    } else if (!node_may_open && cursor.Consume(',')) {
      node_may_open = true;
      after_comma = true;
    } else {
      return cursor.Error(after_comma     ? "expected '('"
                          : node_may_open ? "expected '(' or ')'"
                                          : "expected ',' or ')'");
    }
  }
  if (!cursor.AtEnd()) return cursor.Error("expected the end");

  // Breadth-first: a counting sort by depth, which keeps the order within a level.
  const int nodes = static_cast<int>(opened_parents.size());
  std::vector<std::vector<int>> levels;
  std::vector<int> depths(nodes);
  for (int i = 0; i < nodes; ++i) {
    depths[i] = opened_parents[i] < 0 ? 0 : depths[opened_parents[i]] + 1;
    if (depths[i] == static_cast<int>(levels.size())) levels.emplace_back();
    levels[depths[i]].push_back(i);
  }
  std::vector<int> number(nodes);
  TreeShape shape;
  for (const std::vector<int>& level : levels) {
    for (const int i : level) {
      number[i] = shape.size();
      shape.Add(opened_parents[i] < 0 ? kPrefix : NodeId(number[opened_parents[i]]));
    }
  }
  return shape;
}

std::string TreeShape::ToString() const {
  std::string text = "(";
  NodeId node(0);
  std::vector<int> written(size(), 0);
  while (true) {
    int& rank = written[node.value];
    if (rank < children(node)) {
      if (rank > 0) text += ',';
      node = child(node, rank++);
      text += '(';
    } else {
      text += ')';
      if (node.value == 0) return text;
      node = parent(node);
    }
  }
}

}  // namespace canopy
