#include "trees/token_tree.h"

#include "absl/strings/str_cat.h"
#include "trees/text_cursor.h"

namespace canopy {
namespace {

absl::Status NodeError(int node, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat("token tree: node ", node, " ", problem));
}

}  // namespace

absl::StatusOr<TokenTree> TokenTree::Create(std::span<const NodeId> parents,
                                            std::span<const TokenId> tokens) {
  if (parents.size() != tokens.size()) {
    return absl::InvalidArgumentError(absl::StrCat("token tree: ", parents.size(), " parents for ",
                                                   tokens.size(),
                                                   " tokens; expected one parent a token"));
  }
  TokenTree tree;
  tree.Reserve(static_cast<int>(tokens.size()));
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (auto node = tree.AddNode(parents[i], tokens[i]); !node.ok()) return node.status();
  }
  return tree;
}

absl::StatusOr<TokenTree> TokenTree::Parse(std::string_view text) {
  TextCursor cursor("token tree", text);
  TokenTree tree;
  if (cursor.AtEnd()) return tree;
  NodeId parent = kPrefix;
  while (true) {
    const size_t start = cursor.position();
    absl::StatusOr<int> token = cursor.Number(0, INT32_MAX);
    if (!token.ok()) return token.status();
    if (tree.FindChild(parent, TokenId(*token)) != kPrefix) {
      return cursor.ErrorAt(start, absl::StrCat("token ", *token, " stands twice among siblings"));
    }
    NodeId node = *tree.AddNode(parent, TokenId(*token));
    if (cursor.Consume('(')) {
      parent = node;
      continue;
    }
    while (parent != kPrefix && cursor.Consume(')')) parent = tree.parent(parent);
    if (cursor.Consume(',')) continue;
    if (parent == kPrefix && cursor.AtEnd()) return tree;
    return cursor.Error(parent == kPrefix ? "expected '(', ',' or the end"
                                          : "expected '(', ',' or ')'");
  }
}

absl::StatusOr<NodeId> TokenTree::AddNode(NodeId parent, TokenId token) {
  if (token.value < 0) {
    return NodeError(size(), absl::StrCat("has token ", token.value, "; expected 0 or more"));
  }
  return Add(parent, token);
}

absl::StatusOr<NodeId> TokenTree::AddPromised(NodeId parent, TokenId token) {
  if (!IsPromised(token)) {
    return NodeError(size(), absl::StrCat("has token ", token.value, "; expected a promised one"));
  }
  absl::StatusOr<NodeId> node = Add(parent, token);
  if (node.ok()) promised_ = true;
  return node;
}

absl::StatusOr<NodeId> TokenTree::Add(NodeId parent, TokenId token) {
  if (parent.value < kPrefix.value || parent.value >= size()) {
    return NodeError(size(), absl::StrCat("has parent ", parent.value,
                                          "; expected -1 (the prefix) or a node before it"));
  }
  if (const NodeId twin = FindChild(parent, token); twin != kPrefix) {
    return NodeError(size(), absl::StrCat("has token ", token.value, " like its sibling ",
                                          twin.value, "; expected different tokens"));
  }
  const NodeId node(size());
  NodeId& last = parent == kPrefix ? last_root_ : last_child_[parent.value];
  NodeId& first = parent == kPrefix ? first_root_ : first_child_[parent.value];
  int rank = 0;
  if (last == kPrefix) {
    first = node;
  } else {
    next_sibling_[last.value] = node;
    rank = ranks_[last.value] + 1;
  }
  last = node;
  const int depth = parent == kPrefix ? 0 : depths_[parent.value] + 1;
  tokens_.push_back(token);
  parents_.push_back(parent);
  depths_.push_back(depth);
  ranks_.push_back(rank);
  first_child_.push_back(kPrefix);
  last_child_.push_back(kPrefix);
  next_sibling_.push_back(kPrefix);
  if (depth >= height_) height_ = depth + 1;
  return node;
}

absl::Status TokenTree::Resolve(std::span<const TokenId> tokens) {
  if (tokens.size() != tokens_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("token tree: ", tokens.size(), " tokens for ",
                                                   size(), " nodes; expected one a node"));
  }
  for (int i = 0; i < size(); ++i) {
    const TokenId token = tokens[i];
    if (token.value < 0) {
      return NodeError(i, absl::StrCat("gets token ", token.value, "; expected 0 or more"));
    }
    if (!IsPromised(tokens_[i]) && tokens_[i] != token) {
      return NodeError(i, absl::StrCat("gets token ", token.value, "; it carries ",
                                       tokens_[i].value, ", which was not promised"));
    }
    for (NodeId other = first_child(parents_[i]); other != NodeId(i); other = next_sibling(other)) {
      if (tokens[other.value] == token) {
        return NodeError(i, absl::StrCat("gets token ", token.value, " like its sibling ",
                                         other.value, "; expected different tokens"));
      }
    }
  }
  tokens_.assign(tokens.begin(), tokens.end());
  promised_ = false;
  return absl::OkStatus();
}

void TokenTree::Clear() {
  tokens_.clear();
  parents_.clear();
  depths_.clear();
  ranks_.clear();
  first_child_.clear();
  last_child_.clear();
  next_sibling_.clear();
  first_root_ = last_root_ = kPrefix;
  height_ = 0;
  promised_ = false;
}

void TokenTree::Reserve(int nodes) {
  tokens_.reserve(nodes);
  parents_.reserve(nodes);
  depths_.reserve(nodes);
  ranks_.reserve(nodes);
  first_child_.reserve(nodes);
  last_child_.reserve(nodes);
  next_sibling_.reserve(nodes);
}

NodeId TokenTree::first_child(NodeId node) const {
  return node == kPrefix ? first_root_ : first_child_[node.value];
}

NodeId TokenTree::FindChild(NodeId node, TokenId token) const {
  for (NodeId child = first_child(node); child != kPrefix; child = next_sibling(child)) {
    if (tokens_[child.value] == token) return child;
  }
  return kPrefix;
}

std::vector<NodeId> TokenTree::Path(NodeId node) const {
  std::vector<NodeId> path(node == kPrefix ? 0 : depth(node) + 1);
  for (size_t i = path.size(); i-- > 0; node = parent(node)) path[i] = node;
  return path;
}

std::string TokenTree::ToString() const {
  std::string text;
  NodeId node = first_root_;
  while (node != kPrefix) {
    absl::StrAppend(&text, token(node).value);
    if (const NodeId child = first_child(node); child != kPrefix) {
      text += '(';
      node = child;
      continue;
    }
    // Up to the next ancestor that has a sibling left.
    while (node != kPrefix && next_sibling(node) == kPrefix) {
      node = parent(node);
      if (node != kPrefix) text += ')';
    }
    if (node != kPrefix) {
      text += ',';
      node = next_sibling(node);
    }
  }
  return text;
}

}  // namespace canopy
