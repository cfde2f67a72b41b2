// The problem, as one plain struct: raw pointers and sizes, no framework's types.
//
// Letters as in steermoe_kernels/reference.py. Streams are (batch, time, width), contiguous; with pooling `pooled` =
// ceil(time / pool_size), otherwise `pooled` = time. A null pointer stands for an operand that is absent or a result nobody needs.
#pragma once

#include <cstdint>

namespace steer {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };
enum class Norm : int { kNone = 0, kLayer = 1, kRms = 2 };
// Another kind of pool has to be told wherever kMax and kMean stand; see CONTRIBUTING.md.
enum class Pool : int { kNone = 0, kMax = 1, kMean = 2 };

// A parameter in whatever type it is stored; kernels read it as it is.
struct Parameter {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct Problem {
  std::int64_t batch = 0, time = 0, pooled = 0, width = 0, experts = 0;
  std::int64_t top_k = 0, pool_size = 1;
  bool renormalize = true;
  Norm norm = Norm::kNone;
  Pool pool = Pool::kNone;
  double eps = 1e-5;
  DType stream = DType::kFloat32;

  Parameter weight;       // W (E, D)
  Parameter bias;         // b (E)
  Parameter vectors;      // V (E, D)
  Parameter scale;        // s ()
  Parameter norm_weight;  // gamma (D)
  Parameter norm_bias;    // beta (D)

  std::int64_t frames() const { return batch * time; }
  bool dense() const { return top_k == experts; }
  // The backward of gates that are not renormalised needs the softmax of the experts left out, too.
  bool keeps_probs() const { return !dense() && !renormalize; }
};

// `accumulated` results are double for a float64 stream and float otherwise.
struct Forward {
  Problem problem;
  const void* x = nullptr;         // (B, T, D)
  const void* residual = nullptr;  // (B, T, D)
  void* y = nullptr;               // (B, T, D)
  void* normed = nullptr;          // (B, P, D)
  void* gates = nullptr;           // (B, T, E), accumulated
  void* probs = nullptr;           // (B, T, E), accumulated: the full softmax
  void* stats = nullptr;           // (2, B, P), accumulated: mean, reciprocal deviation
};

struct Backward {
  Problem problem;
  const void* dy = nullptr;       // (B, T, D)
  const void* dnormed = nullptr;  // (B, P, D)
  const void* dgates = nullptr;   // (B, T, E), accumulated
  const void* y = nullptr;        // (B, T, D)
  const void* gates = nullptr;    // (B, T, E), accumulated
  const void* probs = nullptr;    // (B, T, E), accumulated
  const void* stats = nullptr;    // (2, B, P), accumulated
  void* du = nullptr;             // (B, T, D)
  void* dweight = nullptr;        // (E, D), accumulated, as all that follow
  void* dbias = nullptr;          // (E)
  void* dvectors = nullptr;       // (E, D)
  void* dscale = nullptr;         // ()
  void* dnorm_weight = nullptr;   // (D)
  void* dnorm_bias = nullptr;     // (D)
};

}  // namespace steer
