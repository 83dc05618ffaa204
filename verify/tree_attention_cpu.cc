#include <algorithm>
#include <cstring>

#include "verify/tree_attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "verify/tree_attention_cpu.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h:
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

#ifndef CANOPY_VERIFY_TREE_ATTENTION_CPU_ONCE
#define CANOPY_VERIFY_TREE_ATTENTION_CPU_ONCE
namespace canopy {

// Keys of a softmax block, at absolute positions [64 b, 64 b + 64): four vectors of AVX-512.
inline constexpr int kBlock = 64;
inline constexpr int kVectorsPerBlock = kBlock / kKeyBlock;
// Queries that share loads of keys and values; 6 x 4 accumulators of 32 registers.
inline constexpr int kQueryTile = 6;
inline constexpr int kMaxPaddedHeadDim = 512;
// Far below any score, and finite, so that differences of it are numbers.
inline constexpr float kMasked = -1e30f;

// The running softmax of one query.
struct QueryState {
  const float* q = nullptr;  // [head_dim]
  float max = kMasked;
  float sum = 0.0f;
  alignas(64) float acc[kMaxPaddedHeadDim];
};

// Keys and values of one block, wherever they lie.
struct KeyBlockView {
  const float* keys[kVectorsPerBlock];  // [head_dim, kKeyBlock] each; null behind the last key
  const float* values[kBlock];          // [padded head_dim]
};

}  // namespace canopy
#endif  // CANOPY_VERIFY_TREE_ATTENTION_CPU_ONCE

HWY_BEFORE_NAMESPACE();
namespace canopy {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using D = hn::CappedTag<float, kKeyBlock>;
using V = hn::Vec<D>;

// Scores of up to 16 keys for a tile of queries: scores[q][first .. first + 16).
template <int kQueries>
HWY_INLINE void ScoreKeys(QueryState* const* queries, const float* keys, int head_dim, float scale,
                          float (*scores)[kBlock], int first) {
  const D d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int v = 0; v < kKeyBlock; v += lanes) {
    V sum[kQueries];
    for (int i = 0; i < kQueries; ++i) sum[i] = hn::Zero(d);
    for (int k = 0; k < head_dim; ++k) {
      const V key = hn::Load(d, keys + k * kKeyBlock + v);
      for (int i = 0; i < kQueries; ++i)
        sum[i] = hn::MulAdd(hn::Set(d, queries[i]->q[k]), key, sum[i]);
    }
    for (int i = 0; i < kQueries; ++i) {
      hn::StoreU(hn::Mul(sum[i], hn::Set(d, scale)), d, scores[i] + first + v);
    }
  }
}

// Adds probs[i][j] * values[j] for j in [begin, end) to the accumulators, in order.
template <int kQueries, int kVectors>
HWY_INLINE void AddValues(QueryState* const* queries, float (*probs)[kBlock],
                          const float* const* values, int begin, int end, int first) {
  const D d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  V acc[kQueries][kVectors];
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::Load(d, queries[i]->acc + first + v * lanes);
  }
  for (int j = begin; j < end; ++j) {
    V value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = hn::Load(d, values[j] + first + v * lanes);
    for (int i = 0; i < kQueries; ++i) {
      const V p = hn::Set(d, probs[i][j]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::MulAdd(p, value[v], acc[i][v]);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) hn::Store(acc[i][v], d, queries[i]->acc + first + v * lanes);
  }
}

template <int kQueries>
HWY_INLINE void AddAllValues(QueryState* const* queries, float (*probs)[kBlock],
                             const float* const* values, int begin, int end, int padded_head_dim) {
  const int lanes = static_cast<int>(hn::Lanes(D()));
  int first = 0;
  for (; first + 4 * lanes <= padded_head_dim; first += 4 * lanes) {
    AddValues<kQueries, 4>(queries, probs, values, begin, end, first);
  }
  for (; first < padded_head_dim; first += lanes) {
    AddValues<kQueries, 1>(queries, probs, values, begin, end, first);
  }
}

// One block for a tile of queries; query i sees the first keys_seen[i] >= 1 keys of it.
template <int kQueries>
HWY_INLINE void AttendTile(QueryState* const* queries, const int* keys_seen,
                           const KeyBlockView& block, const AttentionShape& shape) {
  const D d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  alignas(64) float scores[kQueries][kBlock];
  for (int v = 0; v < kVectorsPerBlock; ++v) {
    if (block.keys[v] == nullptr) {
      for (int i = 0; i < kQueries; ++i) {
        for (int j = 0; j < kKeyBlock; ++j) scores[i][v * kKeyBlock + j] = kMasked;
      }
    } else {
      ScoreKeys<kQueries>(queries, block.keys[v], shape.head_dim, shape.scale, scores,
                          v * kKeyBlock);
    }
  }
  int shared = kBlock;
  for (int i = 0; i < kQueries; ++i) {
    QueryState& query = *queries[i];
    for (int j = keys_seen[i]; j < kBlock; ++j) scores[i][j] = kMasked;
    V block_max = hn::Load(d, scores[i]);
    for (int j = lanes; j < kBlock; j += lanes)
      block_max = hn::Max(block_max, hn::Load(d, scores[i] + j));
    const float max = std::max(query.max, hn::GetLane(hn::MaxOfLanes(d, block_max)));
    const V max_v = hn::Set(d, max);
    V sum = hn::Zero(d);
    for (int j = 0; j < kBlock; j += lanes) {
      const V p = hn::Exp(d, hn::Sub(hn::Load(d, scores[i] + j), max_v));
      hn::Store(p, d, scores[i] + j);
      sum = hn::Add(sum, p);
    }
    const V rescale = hn::Exp(d, hn::Sub(hn::Set(d, query.max), max_v));
    query.sum = query.sum * hn::GetLane(rescale) + hn::GetLane(hn::SumOfLanes(d, sum));
    query.max = max;
    for (int k = 0; k < shape.padded_head_dim(); k += lanes) {
      hn::Store(hn::Mul(rescale, hn::Load(d, query.acc + k)), d, query.acc + k);
    }
    shared = std::min(shared, keys_seen[i]);
  }
  AddAllValues<kQueries>(queries, scores, block.values, 0, shared, shape.padded_head_dim());
  for (int i = 0; i < kQueries; ++i) {
    AddAllValues<1>(queries + i, scores + i, block.values, shared, keys_seen[i],
                    shape.padded_head_dim());
  }
}

void Attend(QueryState* const* queries, const int* keys_seen, int count, const KeyBlockView& block,
            const AttentionShape& shape) {
  static_assert(kQueryTile == 6);
  switch (count) {
    case 1:
      return AttendTile<1>(queries, keys_seen, block, shape);
    case 2:
      return AttendTile<2>(queries, keys_seen, block, shape);
    case 3:
      return AttendTile<3>(queries, keys_seen, block, shape);
    case 4:
      return AttendTile<4>(queries, keys_seen, block, shape);
    case 5:
      return AttendTile<5>(queries, keys_seen, block, shape);
    default:
      return AttendTile<6>(queries, keys_seen, block, shape);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace canopy
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace canopy {
namespace {

HWY_EXPORT(Attend);

// [blocks, kv_heads, head_dim, kKeyBlock]
float* KeyBlock(const AttentionState& state, const AttentionShape& shape, int block, int kv_head) {
  return state.key_blocks.view().row((block * shape.kv_heads + kv_head) * shape.head_dim);
}

int PositionRows(const AttentionState& state, const AttentionShape& shape) {
  return state.key_blocks.view().rows / (shape.kv_heads * shape.head_dim) * kKeyBlock;
}

// The key of prefix position p.
void StoreKey(const AttentionState& state, const AttentionShape& shape, int position, int kv_head,
              const float* key) {
  float* to = KeyBlock(state, shape, position / kKeyBlock, kv_head) + position % kKeyBlock;
  for (int k = 0; k < shape.head_dim; ++k) to[k * kKeyBlock] = key[k];
}

// Copies K and V of new node i to where later nodes read them.
void KeepKeyValue(const TreePlan& plan, const AttentionShape& shape, ConstMatrix qkv, int i,
                  AttentionState& state) {
  const float* key = qkv.row(plan.first_row() + i) + shape.heads * shape.head_dim;
  const float* value = key + shape.kv_heads * shape.head_dim;
  const int pending = plan.first_pending() + i;
  const Matrix values = state.values.view();
  float* value_row =
      values.row(plan.chain() ? plan.position(i) : PositionRows(state, shape) + pending);
  for (int h = 0; h < shape.kv_heads; ++h) {
    const size_t bytes = sizeof(float) * shape.head_dim;
    const int at = h * shape.padded_head_dim();
    if (plan.chain()) {
      StoreKey(state, shape, plan.position(i), h, key + h * shape.head_dim);
    } else {
      std::memcpy(state.pending_keys.view().row(pending) + at, key + h * shape.head_dim, bytes);
    }
    std::memcpy(value_row + at, value + h * shape.head_dim, bytes);
  }
}

// Attention of new nodes [begin, end) under one KV head.
class AttentionTask {
 public:
  AttentionTask(const TreePlan& plan, const AttentionShape& shape, const AttentionState& state,
                int kv_head)
      : plan_(plan),
        shape_(shape),
        state_(state),
        kv_head_(kv_head),
        // Positions from here on are not all in the prefix.
        shared_end_(plan.chain() ? (plan.prefix() + plan.rows())
                                 : plan.prefix() / kBlock * kBlock) {}

  // The tile's queries are (node, head) pairs [first, last) in node-major order over the KV head's
  // group.
  void Run(int first, int last, ConstMatrix qkv, Matrix out) {
    const int group = shape_.heads / shape_.kv_heads;
    QueryState states[kQueryTile];
    const int count = last - first;
    int last_position = 0;
    for (int k = 0; k < count; ++k) {
      const int node = (first + k) / group;
      const int head = kv_head_ * group + (first + k) % group;
      states[k].q = qkv.row(plan_.first_row() + node) + head * shape_.head_dim;
      std::memset(states[k].acc, 0, sizeof(float) * shape_.padded_head_dim());
      last_position = std::max(last_position, plan_.position(node));
    }
    for (int block = 0; block < std::min(shared_end_, last_position + 1); block += kBlock) {
      SharedBlock(block, first, count, states, group);
    }
    if (!plan_.chain()) {
      for (int k = 0; k < count;) {
        const int node = (first + k) / group;
        int next = k + 1;
        while (next < count && (first + next) / group == node) ++next;
        PathBlocks(node, states + k, next - k);
        k = next;
      }
    }
    for (int k = 0; k < count; ++k) {
      const int node = (first + k) / group;
      const int head = kv_head_ * group + (first + k) % group;
      float* to = out.row(plan_.first_row() + node) + head * shape_.head_dim;
      for (int c = 0; c < shape_.head_dim; ++c) to[c] = states[k].acc[c] / states[k].sum;
    }
  }

 private:
  const float* ValueRow(int row) const {
    return state_.values.view().row(row) + kv_head_ * shape_.padded_head_dim();
  }

  // A block whose positions are all rows of the prefix (or of the chain that is being committed).
  void SharedBlock(int position, int first, int count, QueryState* states, int group) {
    QueryState* queries[kQueryTile];
    int keys_seen[kQueryTile];
    int seeing = 0;
    int most = 0;
    for (int k = 0; k < count; ++k) {
      const int seen = std::min(kBlock, plan_.position((first + k) / group) + 1 - position);
      if (seen <= 0) continue;
      queries[seeing] = &states[k];
      keys_seen[seeing++] = seen;
      most = std::max(most, seen);
    }
    KeyBlockView view;
    for (int v = 0; v < kVectorsPerBlock; ++v) {
      view.keys[v] = v * kKeyBlock < most
                         ? KeyBlock(state_, shape_, position / kKeyBlock + v, kv_head_)
                         : nullptr;
    }
    for (int j = 0; j < most; ++j) view.values[j] = ValueRow(position + j);
    if (seeing > 0) HWY_DYNAMIC_DISPATCH(Attend)(queries, keys_seen, seeing, view, shape_);
  }

  // The blocks of one node that hold the end of the prefix and its pending ancestors.
  void PathBlocks(int node, QueryState* states, int count) {
    const std::span<const int32_t> path = plan_.PendingPath(node);
    const int prefix = plan_.prefix();
    QueryState* queries[kQueryTile];
    int keys_seen[kQueryTile];
    for (int k = 0; k < count; ++k) queries[k] = &states[k];
    for (int position = shared_end_; position <= plan_.position(node); position += kBlock) {
      const int seen = std::min(kBlock, plan_.position(node) + 1 - position);
      KeyBlockView view;
      for (int v = 0; v < kVectorsPerBlock; ++v) {
        const int begin = position + v * kKeyBlock;
        if (v * kKeyBlock >= seen) {
          view.keys[v] = nullptr;
        } else if (begin + kKeyBlock <= prefix) {
          view.keys[v] = KeyBlock(state_, shape_, begin / kKeyBlock, kv_head_);
        } else {
          view.keys[v] = GatherKeys(begin, path, mixed_keys_[v]);
        }
      }
      for (int j = 0; j < seen; ++j) {
        const int p = position + j;
        view.values[j] = ValueRow(p < prefix ? p : PositionRows(state_, shape_) + path[p - prefix]);
      }
      for (int k = 0; k < count; ++k) keys_seen[k] = seen;
      HWY_DYNAMIC_DISPATCH(Attend)(queries, keys_seen, count, view, shape_);
    }
  }

  // Positions [begin, begin + kKeyBlock) as a key block, of which some are pending nodes of `path`.
  const float* GatherKeys(int begin, std::span<const int32_t> path, float* to) const {
    const int prefix = plan_.prefix();
    if (begin < prefix) {
      std::memcpy(to, KeyBlock(state_, shape_, begin / kKeyBlock, kv_head_),
                  sizeof(float) * shape_.head_dim * kKeyBlock);
    }
    for (int j = std::max(0, prefix - begin); j < kKeyBlock; ++j) {
      const size_t step = begin + j - prefix;
      const float* key = step < path.size() ? state_.pending_keys.view().row(path[step]) +
                                                  kv_head_ * shape_.padded_head_dim()
                                            : nullptr;
      for (int k = 0; k < shape_.head_dim; ++k)
        to[k * kKeyBlock + j] = key == nullptr ? 0.0f : key[k];
    }
    return to;
  }

  const TreePlan& plan_;
  const AttentionShape& shape_;
  const AttentionState& state_;
  const int kv_head_;
  const int shared_end_;
  alignas(64) float mixed_keys_[kVectorsPerBlock][kMaxPaddedHeadDim * kKeyBlock];
};

}  // namespace

absl::StatusOr<AttentionState> AllocateAttentionState(Backend& backend, const AttentionShape& shape,
                                                      int max_positions, int max_pending) {
  if (shape.padded_head_dim() > kMaxPaddedHeadDim) {
    return absl::UnimplementedError(absl::StrCat("attention with a head_dim of ", shape.head_dim,
                                                 "; at most ", kMaxPaddedHeadDim, " is supported"));
  }
  AttentionState state;
  const int blocks = (max_positions + kKeyBlock - 1) / kKeyBlock;
  const int columns = shape.kv_heads * shape.padded_head_dim();
  ASSIGN_OR_RETURN(state.key_blocks,
                   Tensor::Allocate(backend, blocks * shape.kv_heads * shape.head_dim, kKeyBlock));
  ASSIGN_OR_RETURN(state.pending_keys, Tensor::Allocate(backend, max_pending, columns));
  ASSIGN_OR_RETURN(state.values,
                   Tensor::Allocate(backend, blocks * kKeyBlock + max_pending, columns));
  return state;
}

absl::Status TreeAttention(CpuBackend& cpu, const TreePlan& plan, const AttentionShape& shape,
                           ConstMatrix qkv, AttentionState& state, Matrix out) {
  if (qkv.columns != (shape.heads + 2 * shape.kv_heads) * shape.head_dim ||
      out.columns != shape.heads * shape.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tree attention: ", qkv.columns, " columns in and ", out.columns, " out do not fit ",
        shape.heads, " heads, ", shape.kv_heads, " KV heads of ", shape.head_dim));
  }
  for (int i = 0; i < plan.rows(); ++i) KeepKeyValue(plan, shape, qkv, i, state);
  const int queries = plan.rows() * (shape.heads / shape.kv_heads);
  const int tiles = (queries + kQueryTile - 1) / kQueryTile;
  cpu.pool().Run(tiles * shape.kv_heads, [&](int t) {
    AttentionTask task(plan, shape, state, t % shape.kv_heads);
    const int first = t / shape.kv_heads * kQueryTile;
    task.Run(first, std::min(queries, first + kQueryTile), qkv, out);
  });
  return absl::OkStatus();
}

void CommitAttention(const DecodeState& sequence, std::span<const NodeId> path,
                     const AttentionShape& shape, AttentionState& state) {
  const Matrix values = state.values.view();
  for (size_t i = 0; i < path.size(); ++i) {
    const int position = sequence.position() + static_cast<int>(i);
    const float* key = state.pending_keys.view().row(path[i].value);
    for (int h = 0; h < shape.kv_heads; ++h) {
      StoreKey(state, shape, position, h, key + h * shape.padded_head_dim());
    }
    std::memcpy(values.row(position), values.row(PositionRows(state, shape) + path[i].value),
                sizeof(float) * values.stride);
  }
}

}  // namespace canopy
#endif  // HWY_ONCE
