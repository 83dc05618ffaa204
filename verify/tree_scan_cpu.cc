#include <algorithm>
#include <cstring>

#include "verify/tree_scan.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "verify/tree_scan_cpu.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h:
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

#ifndef CANOPY_VERIFY_TREE_SCAN_CPU_ONCE
#define CANOPY_VERIFY_TREE_SCAN_CPU_ONCE
namespace canopy {

// Nodes that share loads of the state and of their common ancestors. With 64 dimensions a vector
// set of AVX-512 is 4 registers a node: 6 nodes fill 24 of 32.
inline constexpr int kScanTile = 6;

// One head of a tile of nodes with the same checkpoint.
struct ScanTask {
  const float* state;  // [d_state, padded head_dim], or null: a zero state
  const float* u;      // head's column in the row store
  int64_t u_stride;
  int d_state;
  int head_dim;
  int nodes;                  // 1 to kScanTile
  int common;                 // leading path rows that all nodes share
  const float* c[kScanTile];  // [d_state]
  const int32_t* rows[kScanTile];
  int count[kScanTile];
  const float* weights[kScanTile];  // [count]
  float state_decay[kScanTile];
  float d;
  const float* x[kScanTile];  // [head_dim]
  float* y[kScanTile];        // [head_dim]
};

// Folding one head of a segment.
struct FoldTask {
  const float* from;  // [d_state, padded head_dim]
  float* to;
  const float* u;  // head's column; segment row k is ring row first_row + k
  int64_t u_stride;
  const float* b;  // group's column
  int64_t b_stride;
  const float* log_decay;  // head's element
  int64_t log_decay_stride;
  int d_state;
  int padded_head_dim;
};

}  // namespace canopy
#endif  // CANOPY_VERIFY_TREE_SCAN_CPU_ONCE

HWY_BEFORE_NAMESPACE();
namespace canopy {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using D = hn::CappedTag<float, kRowAlign>;
using V = hn::Vec<D>;

// dt = clamp(softplus(raw + bias)); softplus(v) = max(v, 0) + log1p(exp(-|v|)).
void SoftplusRow(const float* raw, const float* bias, float lo, float hi, int heads, float* dt) {
  const D d;
  const auto zero = hn::Zero(d);
  for (int h = 0; h < heads; h += static_cast<int>(hn::Lanes(d))) {
    const auto v = hn::Add(hn::LoadU(d, raw + h), hn::LoadU(d, bias + h));
    const auto soft = hn::Add(hn::Max(v, zero), hn::Log1p(d, hn::Exp(d, hn::Neg(hn::Abs(v)))));
    hn::StoreU(hn::Min(hn::Max(soft, hn::Set(d, lo)), hn::Set(d, hi)), d, dt + h);
  }
}

// l = l_parent + dt * A, with null for a node at the start of a segment.
void LogDecayRow(const float* parent, const float* dt, const float* a, int heads, float* out) {
  const D d;
  for (int h = 0; h < heads; h += static_cast<int>(hn::Lanes(d))) {
    const auto step = hn::Mul(hn::LoadU(d, dt + h), hn::LoadU(d, a + h));
    hn::StoreU(parent == nullptr ? step : hn::Add(hn::LoadU(d, parent + h), step), d, out + h);
  }
}

// scores[j] = C . B of path row j, over padded d_state (the padding is zero).
void ScoreRow(const float* c, const float* b, int64_t b_stride, const int32_t* rows, int count,
              int padded_d_state, float* scores) {
  const D d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int j = 0; j < count; ++j) {
    const float* row = b + rows[j] * b_stride;
    auto sum = hn::Mul(hn::Load(d, c), hn::Load(d, row));
    for (int n = lanes; n < padded_d_state; n += lanes) {
      sum = hn::MulAdd(hn::Load(d, c + n), hn::Load(d, row + n), sum);
    }
    scores[j] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

// weights[j] = exp(exponent[j]) * scores[j], both readable and writable up to a multiple of
// kRowAlign.
void WeightRow(const float* exponent, const float* scores, int count, float* weights) {
  const D d;
  for (int j = 0; j < count; j += static_cast<int>(hn::Lanes(d))) {
    hn::StoreU(hn::Mul(hn::Exp(d, hn::LoadU(d, exponent + j)), hn::LoadU(d, scores + j)), d,
               weights + j);
  }
}

float ExpOne(float x) {
  const D d;
  return hn::GetLane(hn::Exp(d, hn::Set(d, x)));
}

// Dimensions [first, first + kVectors * lanes) of a tile.
template <int kNodes, int kVectors>
HWY_INLINE void ScanDims(const ScanTask& task, int first) {
  const D d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  V acc[kNodes][kVectors];
  for (int i = 0; i < kNodes; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::Zero(d);
  }
  if (task.state != nullptr) {
    const int64_t stride = PaddedColumns(task.head_dim);
    const float* state = task.state + first;
    for (int n = 0; n < task.d_state; ++n, state += stride) {
      V s[kVectors];
      for (int v = 0; v < kVectors; ++v) s[v] = hn::Load(d, state + v * lanes);
      for (int i = 0; i < kNodes; ++i) {
        const V c = hn::Set(d, task.c[i][n]);
        for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::MulAdd(c, s[v], acc[i][v]);
      }
    }
    for (int i = 0; i < kNodes; ++i) {
      const V decay = hn::Set(d, task.state_decay[i]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::Mul(decay, acc[i][v]);
    }
  }
  for (int j = 0; j < task.common; ++j) {
    const float* row = task.u + task.rows[0][j] * task.u_stride + first;
    V u[kVectors];
    for (int v = 0; v < kVectors; ++v) u[v] = hn::Load(d, row + v * lanes);
    for (int i = 0; i < kNodes; ++i) {
      const V w = hn::Set(d, task.weights[i][j]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::MulAdd(w, u[v], acc[i][v]);
    }
  }
  const V skip = hn::Set(d, task.d);
  for (int i = 0; i < kNodes; ++i) {
    for (int j = task.common; j < task.count[i]; ++j) {
      const float* row = task.u + task.rows[i][j] * task.u_stride + first;
      const V w = hn::Set(d, task.weights[i][j]);
      for (int v = 0; v < kVectors; ++v) {
        acc[i][v] = hn::MulAdd(w, hn::Load(d, row + v * lanes), acc[i][v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const int at = first + v * lanes;
      const int left = task.head_dim - at;
      if (left >= lanes) {
        hn::StoreU(hn::MulAdd(skip, hn::LoadU(d, task.x[i] + at), acc[i][v]), d, task.y[i] + at);
      } else if (left > 0) {  // the next head's columns follow
        alignas(64) float part[kRowAlign] = {};
        std::memcpy(part, task.x[i] + at, left * sizeof(float));
        hn::Store(hn::MulAdd(skip, hn::Load(d, part), acc[i][v]), d, part);
        std::memcpy(task.y[i] + at, part, left * sizeof(float));
      }
    }
  }
}

template <int kNodes>
HWY_INLINE void ScanNodes(const ScanTask& task) {
  const int lanes = static_cast<int>(hn::Lanes(D()));
  const int vectors = PaddedColumns(task.head_dim) / lanes;
  int v = 0;
  for (; v + 4 <= vectors; v += 4) ScanDims<kNodes, 4>(task, v * lanes);
  for (; v + 2 <= vectors; v += 2) ScanDims<kNodes, 2>(task, v * lanes);
  for (; v < vectors; ++v) ScanDims<kNodes, 1>(task, v * lanes);
}

void ScanTile(const ScanTask& task) {
  static_assert(kScanTile == 6);
  switch (task.nodes) {
    case 1:
      return ScanNodes<1>(task);
    case 2:
      return ScanNodes<2>(task);
    case 3:
      return ScanNodes<3>(task);
    case 4:
      return ScanNodes<4>(task);
    case 5:
      return ScanNodes<5>(task);
    default:
      return ScanNodes<6>(task);
  }
}

// How far ahead the fold asks for the state, in floats: both checkpoints have left the caches since
// the last fold. A tenth faster on Zen 4 than without; 2 and 8 KiB gain less.
constexpr int64_t kFoldPrefetch = 1024;

// S <- exp(l_last) S + sum over k of exp(l_last - l_k) u_k B_k^T, k in path order.
template <int kStates, int kVectors>
HWY_INLINE void FoldBlock(const FoldTask& task, float decay, const float* weights, int n,
                          int first) {
  const D d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  V acc[kStates][kVectors];
  const V decay_v = hn::Set(d, decay);
  for (int i = 0; i < kStates; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = static_cast<int64_t>(n + i) * task.padded_head_dim + first + v * lanes;
      // Past the end a prefetch does nothing.
      __builtin_prefetch(task.from + at + kFoldPrefetch);
      __builtin_prefetch(task.to + at + kFoldPrefetch, 1);
      acc[i][v] = hn::Mul(decay_v, hn::Load(d, task.from + at));
    }
  }
  for (int k = 0; k < kSegment; ++k) {
    const float* row = task.u + k * task.u_stride + first;
    V u[kVectors];
    for (int v = 0; v < kVectors; ++v) u[v] = hn::Load(d, row + v * lanes);
    for (int i = 0; i < kStates; ++i) {
      const V w = hn::Set(d, weights[k] * task.b[k * task.b_stride + n + i]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = hn::MulAdd(w, u[v], acc[i][v]);
    }
  }
  for (int i = 0; i < kStates; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = static_cast<int64_t>(n + i) * task.padded_head_dim + first + v * lanes;
      hn::Store(acc[i][v], d, task.to + at);
    }
  }
}

template <int kStates>
HWY_INLINE void FoldStates(const FoldTask& task, float decay, const float* weights, int n) {
  const int lanes = static_cast<int>(hn::Lanes(D()));
  const int vectors = task.padded_head_dim / lanes;
  int v = 0;
  for (; v + 4 <= vectors; v += 4) FoldBlock<kStates, 4>(task, decay, weights, n, v * lanes);
  for (; v < vectors; ++v) FoldBlock<kStates, 1>(task, decay, weights, n, v * lanes);
}

void FoldHead(const FoldTask& task) {
  float weights[kSegment];
  const float last = task.log_decay[(kSegment - 1) * task.log_decay_stride];
  for (int k = 0; k < kSegment; ++k) weights[k] = last - task.log_decay[k * task.log_decay_stride];
  const D d;
  for (int k = 0; k < kSegment; k += static_cast<int>(hn::Lanes(d))) {
    hn::StoreU(hn::Exp(d, hn::LoadU(d, weights + k)), d, weights + k);
  }
  const float decay = ExpOne(last);
  constexpr int kStates = 4;
  int n = 0;
  for (; n + kStates <= task.d_state; n += kStates) FoldStates<kStates>(task, decay, weights, n);
  for (; n < task.d_state; ++n) FoldStates<1>(task, decay, weights, n);
}

}  // namespace HWY_NAMESPACE
}  // namespace canopy
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace canopy {
namespace {

HWY_EXPORT(SoftplusRow);
HWY_EXPORT(LogDecayRow);
HWY_EXPORT(ScoreRow);
HWY_EXPORT(WeightRow);
HWY_EXPORT(ExpOne);
HWY_EXPORT(ScanTile);
HWY_EXPORT(FoldHead);

// Folds the segment that ends before position `end` into the next checkpoint.
void FoldSegment(CpuBackend& cpu, const SsdShape& shape, int64_t end, RecurrentState& state) {
  const int64_t segment = end / kSegment - 1;
  const int first_row = static_cast<int>(segment * kSegment % kRing);
  const Matrix from = state.checkpoints[segment % 2].view();
  const Matrix to = state.checkpoints[(segment + 1) % 2].view();
  const Matrix inputs = state.inputs.view();
  const Matrix keys = state.keys.view();
  const Matrix log_decay = state.log_decay.view();
  cpu.pool().Run(shape.heads, [&](int h) {
    const int group = h / (shape.heads / shape.groups);
    FoldTask task;
    task.from = from.row(h * shape.d_state);
    task.to = to.row(h * shape.d_state);
    task.u = inputs.row(first_row) + h * shape.padded_head_dim();
    task.u_stride = inputs.stride;
    task.b = keys.row(first_row) + group * shape.padded_d_state();
    task.b_stride = keys.stride;
    task.log_decay = log_decay.row(first_row) + h;
    task.log_decay_stride = log_decay.stride;
    task.d_state = shape.d_state;
    task.padded_head_dim = shape.padded_head_dim();
    HWY_DYNAMIC_DISPATCH(FoldHead)(task);
  });
}

// Copies `count` groups of `width` floats, scaled, to groups of `padded` floats with zeros behind.
void SpreadGroups(const float* from, int count, int width, int padded, float scale, float* to) {
  for (int g = 0; g < count; ++g) {
    for (int k = 0; k < width; ++k) to[g * padded + k] = scale * from[g * width + k];
    for (int k = width; k < padded; ++k) to[g * padded + k] = 0.0f;
  }
}

// Scores and rows of the new nodes [begin, end) of a plan, then their outputs. The nodes of a chain
// lie in one segment; a tree comes whole.
class ScanPass {
 public:
  ScanPass(CpuBackend& cpu, const TreePlan& plan, const SsdShape& shape, const SsdParams& params,
           RecurrentState& state, ScanScratch& scratch)
      : cpu_(cpu), plan_(plan), shape_(shape), params_(params), state_(state), scratch_(scratch) {}

  void Run(int begin, int end, ConstMatrix xbc, ConstMatrix dt_raw, Matrix y) {
    KeepInputs(begin, end, xbc, dt_raw);
    AccumulateLogDecay(begin, end);
    Scores(begin, end);
    Outputs(begin, end, xbc, y);
  }

 private:
  // A node's worth of this is below a microsecond, so a task takes several.
  static constexpr int kNodesPerTask = 8;

  template <typename F>
  void ForNodes(int begin, int end, const F& node) {
    cpu_.pool().Run((end - begin + kNodesPerTask - 1) / kNodesPerTask, [&](int task) {
      const int first = begin + task * kNodesPerTask;
      for (int i = first; i < std::min(end, first + kNodesPerTask); ++i) node(i);
    });
  }

  void KeepInputs(int begin, int end, ConstMatrix xbc, ConstMatrix dt_raw) {
    ForNodes(begin, end, [&](int i) {
      const int pass_row = plan_.first_row() + i;
      const int store_row = plan_.StoreRow(i);
      const float* x = xbc.row(pass_row);
      const float* b = x + shape_.inner();
      const float* c = b + shape_.groups * shape_.d_state;
      float* dt = scratch_.dt.view().row(pass_row);
      HWY_DYNAMIC_DISPATCH(SoftplusRow)
      (dt_raw.row(pass_row), params_.dt_bias, params_.dt_min, params_.dt_max, shape_.heads, dt);
      float* u = state_.inputs.view().row(store_row);
      for (int h = 0; h < shape_.heads; ++h) {
        SpreadGroups(x + h * shape_.head_dim, 1, shape_.head_dim, shape_.padded_head_dim(), dt[h],
                     u + h * shape_.padded_head_dim());
      }
      SpreadGroups(b, shape_.groups, shape_.d_state, shape_.padded_d_state(), 1.0f,
                   state_.keys.view().row(store_row));
      SpreadGroups(c, shape_.groups, shape_.d_state, shape_.padded_d_state(), 1.0f,
                   scratch_.c.view().row(pass_row));
    });
  }

  // In node order: a parent's comes before its children's.
  void AccumulateLogDecay(int begin, int end) {
    const Matrix store = state_.log_decay.view();
    for (int i = begin; i < end; ++i) {
      const int t = plan_.position(i);
      const float* parent = nullptr;
      if (t % kSegment != 0) {
        const std::span<const int32_t> path = plan_.PendingPath(i);
        parent = path.size() >= 2 ? store.row(kRing + path[path.size() - 2])
                                  : store.row((t - 1) % kRing);
      }
      HWY_DYNAMIC_DISPATCH(LogDecayRow)
      (parent, scratch_.dt.view().row(plan_.first_row() + i), params_.a, shape_.heads,
       store.row(plan_.StoreRow(i)));
    }
  }

  void Scores(int begin, int end) {
    const Matrix keys = state_.keys.view();
    ForNodes(begin, end, [&](int i) {
      int32_t rows[kRing];
      const int count = plan_.PathRows(i, rows);
      for (int g = 0; g < shape_.groups; ++g) {
        HWY_DYNAMIC_DISPATCH(ScoreRow)
        (scratch_.c.view().row(plan_.first_row() + i) + g * shape_.padded_d_state(),
         keys.data + g * shape_.padded_d_state(), keys.stride, rows, count, shape_.padded_d_state(),
         ScoresOf(i, g));
      }
    });
  }

  float* ScoresOf(int i, int group) const {
    return scratch_.scores.view().row((plan_.first_row() + i) * shape_.groups + group);
  }

  void Outputs(int begin, int end, ConstMatrix xbc, Matrix y) {
    const int tiles = (end - begin + kScanTile - 1) / kScanTile;
    cpu_.pool().Run(tiles * shape_.heads, [&](int task) {
      const int first = begin + task / shape_.heads * kScanTile;
      const int last = std::min(end, first + kScanTile);
      // Nodes on either side of a segment boundary read different checkpoints.
      for (int i = first; i < last;) {
        int next = i + 1;
        while (next < last &&
               CheckpointFor(plan_.position(next)) == CheckpointFor(plan_.position(i))) {
          ++next;
        }
        HeadOutputs(i, next, task % shape_.heads, xbc, y);
        i = next;
      }
    });
  }

  void HeadOutputs(int begin, int end, int head, ConstMatrix xbc, Matrix y) {
    const int group = head / (shape_.heads / shape_.groups);
    const Matrix log_decay = state_.log_decay.view();
    const Matrix inputs = state_.inputs.view();
    int32_t rows[kScanTile][kRing];
    float exponents[kRing];
    float weights[kScanTile][kRing];
    ScanTask task;
    const int64_t checkpoint = CheckpointFor(plan_.position(begin));
    task.state =
        checkpoint == 0
            ? nullptr
            : state_.checkpoints[checkpoint / kSegment % 2].view().row(head * shape_.d_state);
    task.u = inputs.data + head * shape_.padded_head_dim();
    task.u_stride = inputs.stride;
    task.d_state = shape_.d_state;
    task.head_dim = shape_.head_dim;
    task.nodes = end - begin;
    task.d = params_.d[head];
    for (int i = begin; i < end; ++i) {
      const int k = i - begin;
      const int pass_row = plan_.first_row() + i;
      const int count = plan_.PathRows(i, rows[k]);
      // The first segment of the path counts to its end, and the node's own segment to the node.
      const int boundary = plan_.position(i) >= kSegment ? kSegment : 0;
      const float own = log_decay.row(rows[k][count - 1])[head];
      const float first_segment = boundary > 0 ? log_decay.row(rows[k][boundary - 1])[head] : 0.0f;
      for (int j = 0; j < boundary; ++j) {
        exponents[j] = (first_segment - log_decay.row(rows[k][j])[head]) + own;
      }
      for (int j = boundary; j < count; ++j) exponents[j] = own - log_decay.row(rows[k][j])[head];
      for (int j = count; j % kRowAlign != 0; ++j) exponents[j] = 0.0f;
      HWY_DYNAMIC_DISPATCH(WeightRow)(exponents, ScoresOf(i, group), count, weights[k]);
      task.c[k] = scratch_.c.view().row(pass_row) + group * shape_.padded_d_state();
      task.rows[k] = rows[k];
      task.count[k] = count;
      task.weights[k] = weights[k];
      task.state_decay[k] = HWY_DYNAMIC_DISPATCH(ExpOne)(first_segment + own);
      task.x[k] = xbc.row(pass_row) + head * shape_.head_dim;
      task.y[k] = y.row(pass_row) + head * shape_.head_dim;
    }
    task.common = task.count[0];
    for (int k = 1; k < task.nodes; ++k) {
      int same = 0;
      while (same < std::min(task.common, task.count[k]) && rows[k][same] == rows[0][same]) ++same;
      task.common = same;
    }
    HWY_DYNAMIC_DISPATCH(ScanTile)(task);
  }

  CpuBackend& cpu_;
  const TreePlan& plan_;
  const SsdShape& shape_;
  const SsdParams& params_;
  RecurrentState& state_;
  ScanScratch& scratch_;
};

}  // namespace

absl::StatusOr<ScanScratch> ScanScratch::Allocate(Backend& backend, int rows,
                                                  const SsdShape& shape) {
  ScanScratch scratch;
  ASSIGN_OR_RETURN(scratch.dt, Tensor::Allocate(backend, rows, shape.heads));
  ASSIGN_OR_RETURN(scratch.c,
                   Tensor::Allocate(backend, rows, shape.groups * shape.padded_d_state()));
  ASSIGN_OR_RETURN(scratch.scores, Tensor::Allocate(backend, rows * shape.groups, kRing));
  return scratch;
}

absl::StatusOr<RecurrentState> AllocateSsdState(Backend& backend, const SsdShape& shape,
                                                int max_pending) {
  RecurrentState state;
  for (Tensor& checkpoint : state.checkpoints) {
    ASSIGN_OR_RETURN(checkpoint,
                     Tensor::Allocate(backend, shape.heads * shape.d_state, shape.head_dim));
  }
  const int rows = kRing + max_pending;
  ASSIGN_OR_RETURN(state.inputs,
                   Tensor::Allocate(backend, rows, shape.heads * shape.padded_head_dim()));
  ASSIGN_OR_RETURN(state.keys,
                   Tensor::Allocate(backend, rows, shape.groups * shape.padded_d_state()));
  ASSIGN_OR_RETURN(state.log_decay, Tensor::Allocate(backend, rows, shape.heads));
  return state;
}

absl::Status TreeScan(CpuBackend& cpu, const TreePlan& plan, const SsdShape& shape,
                      const SsdParams& params, ConstMatrix xbc, ConstMatrix dt,
                      RecurrentState& state, ScanScratch& scratch, Matrix y) {
  if (xbc.columns != shape.channels() || dt.columns != shape.heads || y.columns != shape.inner()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tree scan: ", xbc.columns, " channels, ", dt.columns, " heads and ", y.columns,
        " outputs; expected ", shape.channels(), ", ", shape.heads, " and ", shape.inner()));
  }
  ScanPass pass(cpu, plan, shape, params, state, scratch);
  if (!plan.chain()) {
    pass.Run(0, plan.rows(), xbc, dt, y);
    return absl::OkStatus();
  }
  for (int begin = 0; begin < plan.rows();) {
    const int position = plan.position(begin);
    const int end = std::min(plan.rows(), begin + kSegment - position % kSegment);
    pass.Run(begin, end, xbc, dt, y);
    const int reached = position + end - begin;
    if (reached % kSegment == 0) FoldSegment(cpu, shape, reached, state);
    begin = end;
  }
  return absl::OkStatus();
}

absl::Status CommitSsd(CpuBackend& cpu, const DecodeState& sequence, std::span<const NodeId> path,
                       const SsdShape& shape, RecurrentState& state) {
  const auto copy = [](const Matrix& store, int from, int to) {
    std::memcpy(store.row(to), store.row(from), sizeof(float) * store.stride);
  };
  const int position = sequence.position();
  for (size_t i = 0; i < path.size(); ++i) {
    const int to = static_cast<int>(position + i) % kRing;
    const int from = kRing + path[i].value;
    copy(state.inputs.view(), from, to);
    copy(state.keys.view(), from, to);
    copy(state.log_decay.view(), from, to);
  }
  const int reached = position + static_cast<int>(path.size());
  if (reached / kSegment > position / kSegment) {
    FoldSegment(cpu, shape, reached / kSegment * kSegment, state);
  }
  return absl::OkStatus();
}

}  // namespace canopy
#endif  // HWY_ONCE
