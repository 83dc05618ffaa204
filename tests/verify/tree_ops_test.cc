// The tree operators against the recurrences that they stand for, in double and one path at a time.

#include <cmath>
#include <random>
#include <vector>

#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "gtest/gtest.h"
#include "tests/support/random_model.h"
#include "verify/tree_attention.h"
#include "verify/tree_conv.h"
#include "verify/tree_plan.h"
#include "verify/tree_scan.h"

namespace canopy {
namespace {

Tensor RandomTensor(CpuBackend& cpu, std::mt19937_64& rng, int rows, int columns, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  Tensor tensor = *Tensor::Allocate(cpu, rows + 1, columns);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) tensor.view().row(r)[c] = normal(rng);
  }
  return tensor;
}

// Positions 0 .. prefix + rows - 1 on the path to node i, as rows of one input matrix in which the
// prefix comes first and the tree's nodes behind it.
std::vector<int> PathInputs(int prefix, const TokenTree& tree, int node) {
  std::vector<int> rows;
  for (int p = 0; p < prefix; ++p) rows.push_back(p);
  for (NodeId n : tree.Path(NodeId(node))) rows.push_back(prefix + n.value);
  return rows;
}

// A sequence whose prefix is fed as a committed chain in chunks and whose tree is fed in two steps,
// through one operator.
class TreeOps : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    cpu_ = *CpuBackend::Create(2);
    model_ = testing::MakeRandomModel(*cpu_, {});
    prefix_ = GetParam();
    tree_ = testing::RandomTree(rng_, kNodes, 20, 1000000);
  }

  static constexpr int kNodes = 33;

  // Calls op(plan, first input row) for every pass; the rows of a pass are at the front of its
  // matrices.
  template <typename F>
  void Feed(const F& op) {
    auto state = *model_->NewState({.max_positions = 512, .max_pending = kNodes});
    TreePlan plan;
    for (int done = 0; done < prefix_;) {
      const int rows = std::min(prefix_ - done, 41);
      plan.BuildChain(*state, rows, 0);
      op(plan, done);
      state->Advance(rows);
      done += rows;
    }
    for (int begin : {0, 13}) {
      const int end = begin == 0 ? 13 : kNodes;
      for (int i = begin; i < end; ++i) state->AddPending(TokenId(0), tree_.parent(NodeId(i)));
      plan.BuildTree(*state, begin, 0);
      op(plan, prefix_ + begin);
    }
  }

  std::mt19937_64 rng_{3};
  std::unique_ptr<CpuBackend> cpu_;
  std::unique_ptr<LanguageModel> model_;
  int prefix_ = 0;
  TokenTree tree_;
};

TEST_P(TreeOps, Conv) {
  const int channels = 37;
  const int kernel = 4;
  const int total = prefix_ + kNodes;
  const Tensor in = RandomTensor(*cpu_, rng_, total, channels, 1.0f);
  const Tensor weight = RandomTensor(*cpu_, rng_, kernel, channels, 0.5f);
  const Tensor bias = RandomTensor(*cpu_, rng_, 1, channels, 0.1f);
  Tensor out = *Tensor::Allocate(*cpu_, total + 1, channels);
  ConvState state;
  state.rows = *Tensor::Allocate(*cpu_, kernel - 1 + kNodes, channels);
  Feed([&](const TreePlan& plan, int first) {
    ASSERT_TRUE(TreeConvSilu(*cpu_, plan, in.view().Rows(first, plan.rows()), weight.Rows(kernel),
                             bias.Rows(1), state, out.view().Rows(first, plan.rows()))
                    .ok());
  });
  for (int i = 0; i < kNodes; ++i) {
    const std::vector<int> path = PathInputs(prefix_, tree_, i);
    for (int c = 0; c < channels; ++c) {
      double sum = bias.view().row(0)[c];
      for (int b = 0; b < kernel && b < static_cast<int>(path.size()); ++b) {
        sum += static_cast<double>(weight.view().row(kernel - 1 - b)[c]) *
               in.view().row(path[path.size() - 1 - b])[c];
      }
      EXPECT_NEAR(out.view().row(prefix_ + i)[c], sum / (1.0 + std::exp(-sum)), 1e-5)
          << "node " << i;
    }
  }
}

TEST_P(TreeOps, Scan) {
  for (const SsdShape shape :
       {SsdShape{4, 16, 1, 16}, SsdShape{6, 24, 2, 20}, SsdShape{3, 72, 3, 48}}) {
    const int total = prefix_ + kNodes;
    const Tensor xbc = RandomTensor(*cpu_, rng_, total, shape.channels(), 1.0f);
    const Tensor dt = RandomTensor(*cpu_, rng_, total, shape.heads, 1.0f);
    Tensor y = *Tensor::Allocate(*cpu_, total + 1, shape.inner());
    std::vector<float> a(kRowAlign), d(kRowAlign), dt_bias(kRowAlign);
    for (int h = 0; h < shape.heads; ++h) {
      a[h] = -0.3f - 0.4f * h;
      d[h] = 0.5f + 0.1f * h;
      dt_bias[h] = -1.5f + 0.2f * h;
    }
    const SsdParams params{a.data(), d.data(), dt_bias.data(), 0.01f, 1.2f};
    RecurrentState state = *AllocateSsdState(*cpu_, shape, kNodes);
    ScanScratch scratch = *ScanScratch::Allocate(*cpu_, 64, shape);
    Feed([&](const TreePlan& plan, int first) {
      ASSERT_TRUE(TreeScan(*cpu_, plan, shape, params, xbc.view().Rows(first, plan.rows()),
                           dt.view().Rows(first, plan.rows()), state, scratch,
                           y.view().Rows(first, plan.rows()))
                      .ok());
    });
    for (int i = 0; i < kNodes; ++i) {
      const std::vector<int> path = PathInputs(prefix_, tree_, i);
      for (int h = 0; h < shape.heads; ++h) {
        const int group = h / (shape.heads / shape.groups);
        std::vector<double> s(shape.head_dim * shape.d_state, 0.0);
        std::vector<double> expected(shape.head_dim);
        for (int row : path) {
          const float* x = xbc.view().row(row) + h * shape.head_dim;
          const float* b = xbc.view().row(row) + shape.inner() + group * shape.d_state;
          const float* c = b + shape.groups * shape.d_state;
          const double raw = static_cast<double>(dt.view().row(row)[h]) + dt_bias[h];
          const double step = std::min<double>(
              params.dt_max, std::max<double>(params.dt_min, std::log1p(std::exp(raw))));
          const double decay = std::exp(step * a[h]);
          for (int p = 0; p < shape.head_dim; ++p) {
            expected[p] = d[h] * x[p];
            for (int n = 0; n < shape.d_state; ++n) {
              double& state_pn = s[p * shape.d_state + n];
              state_pn = decay * state_pn + step * x[p] * b[n];
              expected[p] += state_pn * c[n];
            }
          }
        }
        for (int p = 0; p < shape.head_dim; ++p) {
          EXPECT_NEAR(y.view().row(prefix_ + i)[h * shape.head_dim + p], expected[p], 2e-4)
              << "node " << i << " head " << h;
        }
      }
    }
  }
}

TEST_P(TreeOps, Attention) {
  for (const AttentionShape shape :
       {AttentionShape{4, 2, 16, 0.25f}, AttentionShape{6, 2, 20, 0.2f},
        AttentionShape{8, 1, 40, 0.15f}}) {
    const int total = prefix_ + kNodes;
    const Tensor qkv =
        RandomTensor(*cpu_, rng_, total, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, 1.5f);
    Tensor out = *Tensor::Allocate(*cpu_, total + 1, shape.heads * shape.head_dim);
    AttentionState state = *AllocateAttentionState(*cpu_, shape, 512, kNodes);
    Feed([&](const TreePlan& plan, int first) {
      ASSERT_TRUE(TreeAttention(*cpu_, plan, shape, qkv.view().Rows(first, plan.rows()), state,
                                out.view().Rows(first, plan.rows()))
                      .ok());
    });
    for (int i = 0; i < kNodes; ++i) {
      const std::vector<int> path = PathInputs(prefix_, tree_, i);
      for (int h = 0; h < shape.heads; ++h) {
        const float* q = qkv.view().row(path.back()) + h * shape.head_dim;
        const int kv = h / (shape.heads / shape.kv_heads);
        std::vector<double> expected(shape.head_dim, 0.0);
        double norm = 0.0;
        for (int row : path) {
          const float* k = qkv.view().row(row) + (shape.heads + kv) * shape.head_dim;
          const float* v = k + shape.kv_heads * shape.head_dim;
          double score = 0.0;
          for (int c = 0; c < shape.head_dim; ++c) score += static_cast<double>(q[c]) * k[c];
          const double weight = std::exp(score * shape.scale);
          norm += weight;
          for (int c = 0; c < shape.head_dim; ++c) expected[c] += weight * v[c];
        }
        for (int c = 0; c < shape.head_dim; ++c) {
          EXPECT_NEAR(out.view().row(prefix_ + i)[h * shape.head_dim + c], expected[c] / norm, 2e-5)
              << "node " << i << " head " << h;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(PrefixLengths, TreeOps,
                         ::testing::Values(0, 1, 2, 31, 32, 40, 64, 77, 130));

}  // namespace
}  // namespace canopy
