// SPDX-License-Identifier: MIT
// What the C API refuses, with its texts.
#include <vector>

#include "c_api.h"

namespace {

using kimi::test::error_has;
using kimi::test::Gate;

void test_refusals() {
  EXPECT(kimi_topk_gate(nullptr, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT);
  EXPECT(error_has("params: expected a pointer, got NULL"));
  Gate gate;
  gate.counts.assign(Gate::kExperts, -7);
  gate.p.top_k = 33;
  EXPECT(gate.run() == KIMI_INVALID_ARGUMENT && error_has("k: expected 1..32"));
  EXPECT(gate.counts[0] == -7);  // nothing was written
  gate.p.top_k = Gate::kK;
  EXPECT(gate.run(kimi_device(9)) == KIMI_INVALID_ARGUMENT && error_has("device: expected"));
  gate.p.score_function = kimi_score_function(7);
  EXPECT(gate.run() == KIMI_INVALID_ARGUMENT && error_has("score_function: expected"));
  gate.p.score_function = KIMI_SCORE_SIGMOID;
  gate.p.logits_dtype = kimi_dtype(7);
  EXPECT(gate.run() == KIMI_INVALID_ARGUMENT && error_has("logits_dtype: expected"));
  EXPECT(kimi_set_num_threads(-1) == KIMI_INVALID_ARGUMENT);
  EXPECT(kimi_set_max_sm(10) == KIMI_INVALID_ARGUMENT && error_has("80 and above, got 10"));
  EXPECT(kimi_set_max_sm(80) == KIMI_OK && kimi_max_sm() == 80);
  EXPECT(kimi_set_max_sm(0) == KIMI_OK && kimi_max_sm() == 0);
  EXPECT(kimi_batch_invariant() == 0);
  kimi_set_batch_invariant(1);
  EXPECT(kimi_batch_invariant() == 1);
  kimi_set_batch_invariant(0);
  EXPECT(kimi_batch_invariant() == 0);
  if (kimi_detected_isa() < KIMI_ISA_AMX) {
    EXPECT(kimi_set_isa(KIMI_ISA_AMX) == KIMI_INVALID_ARGUMENT &&
           error_has("expected portable to"));
  }
}

void test_sizes_are_refused_below_python_too() {
  const auto refuses = [](auto change, const char* text) {
    Gate gate;
    change(gate.p);
    EXPECT(gate.run() == KIMI_INVALID_ARGUMENT && error_has(text));
  };
  using P = kimi_topk_gate_params;
  refuses([](P& p) { p.num_experts = 0; }, "logits.shape[1]: expected 1..1024, got 0");
  refuses([](P& p) { p.top_k = 97; }, "k: expected 1..32");
  refuses([](P& p) { p.num_groups = 5; },
          "num_groups: expected a divisor of the 96 experts, got 5");
  refuses([](P& p) { p.num_groups = 48; }, "k: expected 1..2 (at most 32, and 1 group(s) of 2");
  refuses([](P& p) { p.logits = nullptr; }, "logits, indices: expected pointers, got NULL");
}

// What the calls beside given ids refuse alike: those of ids from elsewhere, and the backward.
template <class Params>
void test_refusals_beside_ids(kimi_status (*op)(const Params*, kimi_device, void*),
                              const Params& good, const char* expected_ids) {
  const auto refuses = [&](auto change, const char* text) {
    Params p = good;
    change(p);
    EXPECT(op(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT);
    EXPECT(error_has(text));
  };
  using P = Params;
  EXPECT(op(&good, KIMI_DEVICE_CPU, nullptr) == KIMI_OK);
  refuses([](P& p) { p.num_tokens = -1; }, "num_tokens: expected 0 or more, got -1");
  refuses([](P& p) { p.num_experts = 0; }, "logits.shape[1]: expected 1..1024, got 0");
  refuses([](P& p) { p.num_experts = 1025; }, "logits.shape[1]: expected 1..1024, got 1025");
  refuses([](P& p) { p.logits_dtype = kimi_dtype(3); }, "logits_dtype: expected a kimi_dtype");
  refuses([](P& p) { p.logits_stride = -1; }, "logits_stride: expected 0 or more elements, got -1");
  refuses([](P& p) { p.logits_stride = 0; }, "logits_stride: expected the distance");
  refuses([](P& p) { p.score_function = kimi_score_function(3); }, "score_function: expected");
  refuses([](P& p) { p.scaling_factor = 0; }, "scaling_factor: expected a number other than 0");
  refuses([](P& p) { p.top_k = 0; }, expected_ids);
  refuses([](P& p) { p.top_k = 33; }, ": expected 1..32, got 33");
  refuses([](P& p) { p.num_experts = p.top_k - 1; }, ": expected 1..7, got 8");
  refuses([](P& p) { p.logits = nullptr; }, "logits, indices: expected pointers, got NULL");
  refuses([](P& p) { p.indices = nullptr; }, "logits, indices: expected pointers, got NULL");
}

void test_given_ids_and_the_backward_refuse() {
  Gate gate;
  EXPECT(gate.run() == KIMI_OK);
  std::vector<int32_t> ids = gate.indices;
  kimi_topk_gate_given_params p = {};
  p.logits = gate.logits.data(), p.given = ids.data();
  p.weights = gate.weights.data(), p.indices = gate.indices.data();
  p.tokens_per_expert = gate.counts.data();
  p.num_tokens = Gate::kTokens, p.logits_stride = p.num_experts = Gate::kExperts;
  p.top_k = Gate::kK, p.scaling_factor = 1;
  test_refusals_beside_ids(kimi_topk_gate_given, p, "ids.shape[1]: expected 1..32, got 0");
  const auto refused = [](kimi_topk_gate_given_params of, const char* text) {
    return kimi_topk_gate_given(&of, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT &&
           error_has(text);
  };
  auto without = p;
  without.given = nullptr;
  EXPECT(refused(without, "given: expected a pointer, got NULL"));
  without = p, without.weights = nullptr;
  EXPECT(refused(without, "weights, tokens_per_expert: expected pointers, got NULL"));
  without = p, without.tokens_per_expert = nullptr;
  EXPECT(refused(without, "weights, tokens_per_expert: expected pointers, got NULL"));
  for (int32_t bad : {-2, Gate::kExperts + 1, INT32_MAX}) {
    ids.back() = bad;
    gate.counts.assign(Gate::kExperts, -7);
    EXPECT(refused(p, "ids: expected -1 .. 96, got") && gate.counts[0] == -7);
  }

  std::vector<float> gradients(gate.logits.size());
  kimi_topk_gate_backward_params b = {};
  b.grad_weights = gate.weights.data(), b.logits = p.logits, b.indices = gate.indices.data();
  b.grad_logits = gradients.data();
  b.num_tokens = p.num_tokens, b.logits_stride = p.logits_stride, b.num_experts = p.num_experts;
  b.top_k = p.top_k, b.scaling_factor = 1;
  test_refusals_beside_ids(kimi_topk_gate_backward, b, "indices.shape[1]: expected 1..32, got 0");
  for (const bool of_weights : {true, false}) {
    auto missing = b;
    if (of_weights)
      missing.grad_weights = nullptr;
    else
      missing.grad_logits = nullptr;
    EXPECT(kimi_topk_gate_backward(&missing, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT);
    EXPECT(error_has("grad_weights, grad_logits: expected pointers, got NULL"));
  }
}

void test_losses_refuse_sizes_and_say_their_workspace() {
  const auto refuses = [](auto change, const char* text) {
    kimi_sequence_balance_loss_params p = {};
    p.num_sequences = 1;
    p.logits_stride = p.num_experts = 16;
    p.top_k = 2;
    change(p);
    EXPECT(kimi_sequence_balance_loss(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT);
    EXPECT(error_has(text));
  };
  using P = kimi_sequence_balance_loss_params;
  refuses([](P& p) { p.num_experts = 0; }, "logits.shape[1]: expected 1..1024, got 0");
  refuses([](P& p) { p.top_k = 0; }, "indices: expected at least one id a token");
  refuses([](P& p) { p.num_tokens = 4, p.num_sequences = 3; },
          "expected a divisor of the 4 tokens");
  refuses([](P& p) { p.num_tokens = 4; }, "logits: expected a pointer, got NULL");
  refuses([](P& p) { p.num_sequences = 0; }, "num_sequences: expected a divisor of the 0 tokens");
  refuses([](P& p) { p.num_tokens = int64_t{1} << 31; }, "num_tokens: expected 0..2147483647");
  refuses([](P& p) { p.logits_stride = -1; }, "logits_stride: expected 0 or more elements, got -1");
  refuses([](P&) {},
          "loss, tokens_per_expert, sequence_tokens, workspace: expected pointers, got NULL");
  P sizes = {};
  sizes.num_tokens = 130, sizes.num_sequences = 2, sizes.num_experts = 10;
  EXPECT(kimi_sequence_balance_loss_workspace_bytes(&sizes, KIMI_DEVICE_CPU) == 4 * 3);
  sizes.num_tokens = -1;
  EXPECT(kimi_sequence_balance_loss_workspace_bytes(&sizes, KIMI_DEVICE_CPU) == 0);
  kimi_z_loss_params z = {};
  z.num_tokens = 65;
  EXPECT(kimi_z_loss_workspace_bytes(&z, KIMI_DEVICE_CPU) == 8);
  z.logits_stride = z.num_experts = 16;
  z.logits_dtype = kimi_dtype(7);
  EXPECT(kimi_z_loss(&z, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT);
  EXPECT(error_has("logits_dtype: expected a kimi_dtype"));
  kimi_update_expert_bias_params bias = {};
  bias.num_experts = -1;
  EXPECT(kimi_update_expert_bias(&bias, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT);
}

void test_fp8_products_refuse_what_tma_cannot_read() {
  alignas(16) static char memory[4096] = {};
  const int32_t end = 4;
  const auto call = [&](auto change) {
    kimi_grouped_gemm_fp8_params p = {};
    p.a = p.b = memory;
    p.a_scale = p.b_scale = reinterpret_cast<const float*>(memory);
    p.offsets = &end;
    p.out = memory;
    p.num_rows = p.a_scale_stride = 4;
    p.k = p.a_row_stride = 32;
    p.n = 16;
    p.num_experts = 1;
    change(p);
    return kimi_grouped_gemm_fp8(&p, KIMI_DEVICE_CPU, nullptr);
  };
  using P = kimi_grouped_gemm_fp8_params;
  EXPECT(call([](P&) {}) == KIMI_UNSUPPORTED && error_has("expected cuda, got cpu"));
  EXPECT(call([](P& p) { p.a = memory + 8; }) == KIMI_INVALID_ARGUMENT && error_has("16 divides"));
  EXPECT(call([](P& p) { p.k = 30; }) == KIMI_INVALID_ARGUMENT && error_has("K: expected"));
  EXPECT(call([](P& p) { p.a_scale_stride = 3; }) == KIMI_INVALID_ARGUMENT);
  EXPECT(error_has("a_scale_stride"));
}

// A GPU's blocks read A and B while others write D; a CPU packs both first. Of C, which may be D on
// both, an element is read where it is written.
void test_products_want_memory_of_their_own() {
  using P = kimi_matrix_product_params;
  constexpr kimi_device kGpu = KIMI_DEVICE_CUDA, kCpu = KIMI_DEVICE_CPU;
  static float memory[200];
  // 3 x 4 = 3 x 5 by 5 x 4, side by side in lines of 20: A from 0 on, B from 5, C from 10, D from 15
  const auto status_of = [](kimi_device device, const auto& change) {
    P p = {};
    p.a = memory, p.b = memory + 5, p.c = memory + 10, p.d = memory + 15;
    p.rows = 3, p.cols = 4, p.depth = 5;
    p.a_row_stride = p.b_row_stride = p.c_stride = p.d_stride = 20;
    p.a_col_stride = p.b_col_stride = 1;
    p.alpha = p.beta = 1;
    const kimi::test::Workspace workspace(p, kimi_matrix_product_workspace_bytes);
    change(p);
    return kimi_matrix_product(&p, device, nullptr);
  };
  const auto refused = [&](kimi_device device, const char* expected, const auto& change) {
    return status_of(device, change) == KIMI_INVALID_ARGUMENT && error_has(expected);
  };
  const char *of_a = "own, or c's on a GPU, got some that a uses too", *of_b = "some that b uses",
             *of_c = "own, or c's with c's stride, got some that c uses too";
  EXPECT(refused(kGpu, of_a, [](P& p) { p.d = memory; }));
  EXPECT(refused(kGpu, of_a, [](P& p) { p.d = memory + 2 * 20 + 4; }));  // its last element
  EXPECT(refused(kGpu, of_a, [](P& p) { p.a = memory + 18; }));          // and its first
  EXPECT(refused(kGpu, of_a, [](P& p) { p.a_row_stride = 19; }));        // lines cross
  EXPECT(refused(kGpu, of_a, [](P& p) { p.a = memory + 57, p.a_row_stride = -20; }));
  EXPECT(refused(kGpu, of_a, [](P& p) {  // by columns, which are the lines
    p.a_row_stride = 1, p.a_col_stride = 20, p.d = memory + 82;
  }));
  EXPECT(refused(kGpu, of_b, [](P& p) { p.d = memory + 4 * 20 + 8; }));
  for (kimi_device device : {kGpu, kCpu}) {
    EXPECT(refused(device, of_c, [](P& p) { p.d = memory + 12; }));
    EXPECT(refused(device, "d_stride: expected at least the 4", [](P& p) { p.d_stride = 3; }));
  }
  EXPECT(refused(kCpu, of_c, [](P& p) { p.d = memory + 10, p.d_stride = 30; }));
  EXPECT(status_of(kCpu, [](P&) {}) == KIMI_OK);
  EXPECT(status_of(kCpu, [](P& p) { p.d = memory + 14; }) == KIMI_OK);  // up to C's end
  EXPECT(status_of(kCpu, [](P& p) { p.d = memory + 26, p.c = memory + 10; }) == KIMI_OK);
  EXPECT(status_of(kCpu, [](P& p) { p.d = memory + 10; }) == KIMI_OK);
  EXPECT(status_of(kCpu, [](P& p) { p.d = memory + 2; }) == KIMI_OK);
  EXPECT(status_of(kCpu, [](P& p) { p.d = memory + 12, p.beta = 0; }) == KIMI_OK);
  EXPECT(refused(kCpu, "workspace", [](P& p) { p.workspace = nullptr; }));
  const P none = {};
  EXPECT(kimi_matrix_product_workspace_bytes(&none, kGpu) == 0);
}

// Every op that works in a workspace is told its size; here one of them says each refusal.
void test_workspaces_are_checked() {
  Gate gate;
  EXPECT(gate.run() == KIMI_OK);
  std::vector<int32_t> row_map(gate.indices.size()), source(gate.indices.size());
  std::vector<int32_t> offsets(Gate::kExperts), counts(Gate::kExperts);
  kimi_permute_plan_params p = {};
  p.indices = gate.indices.data(), p.row_map = row_map.data(), p.source = source.data();
  p.offsets = offsets.data(), p.tokens_per_expert = counts.data();
  p.num_tokens = Gate::kTokens, p.num_experts = Gate::kExperts, p.top_k = Gate::kK, p.align = 1;
  const auto refused = [&](const char* text) {
    return kimi_permute_plan(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT &&
           error_has(text) && offsets.back() == 0;
  };
  EXPECT(refused("got NULL"));
  const kimi::test::Workspace workspace(p, kimi_permute_plan_workspace_bytes);
  p.workspace_bytes = workspace.size - 1;
  EXPECT(refused("permute_plan: workspace_bytes: expected at least"));
  EXPECT(refused("allocate what kimi_permute_plan_workspace_bytes() says"));
  p.workspace_bytes = 0;
  EXPECT(refused("got 0; allocate"));
  p.workspace_bytes = workspace.size;
  p.workspace = workspace.data.get() + 4;
  EXPECT(refused("workspace: expected 64-byte aligned memory, got 4 bytes past that"));
  p.workspace = workspace.data.get();
  EXPECT(kimi_permute_plan(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_OK && offsets.back() != 0);
}

// Sizes whose product passes 64 bits ask for more than there is, not for what is left of it.
void test_sizes_of_no_memory() {
  constexpr size_t kTooMany = INT64_MAX;
  constexpr int64_t kLarge = int64_t{1} << 40;
  const int threads = kimi_num_threads();
  EXPECT(kimi_set_num_threads(5) == KIMI_OK);
  for (int64_t width : {int64_t{1} << 60, (int64_t{1} << 61) + 16, INT64_MAX - 1000}) {
    kimi_fused_experts_params p = {};
    p.num_tokens = p.hidden = 8, p.top_k = p.num_experts = 1, p.width = width;
    EXPECT(kimi_fused_experts_workspace_bytes(&p, KIMI_DEVICE_CPU) == kTooMany);
    alignas(64) char memory[64];
    p.workspace = memory, p.workspace_bytes = sizeof memory;
    EXPECT(kimi_fused_experts(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT &&
           error_has("workspace_bytes: expected at least 9223372036854775807, got 64"));
    kimi_fused_experts_backward_params back = {};
    back.num_tokens = back.hidden = 8, back.top_k = back.num_experts = 1, back.width = width;
    EXPECT(kimi_fused_experts_backward_workspace_bytes(&back, KIMI_DEVICE_CPU) == kTooMany);
  }
  kimi_attention_max_logits_params logits = {};
  logits.batch = logits.heads = logits.queries = kLarge, logits.kv_heads = 1;
  EXPECT(kimi_attention_max_logits_workspace_bytes(&logits, KIMI_DEVICE_CPU) == kTooMany);
  kimi_attention_max_logits_params deep = {};  // at least a panel of that depth, on every engine
  deep.batch = deep.heads = deep.kv_heads = deep.queries = deep.keys = 1;
  for (int64_t dim : {int64_t{1} << 52, int64_t{1} << 53, int64_t{9150170671482913}}) {
    deep.dim = dim;
    EXPECT(kimi_attention_max_logits_workspace_bytes(&deep, KIMI_DEVICE_CPU) >= size_t(dim));
  }
  kimi_matrix_product_params product = {};
  product.rows = product.cols = product.depth = kLarge;
  EXPECT(kimi_matrix_product_workspace_bytes(&product, KIMI_DEVICE_CPU) == kTooMany);
  kimi_newton_schulz_params chain = {};
  chain.num_matrices = 5, chain.rows = chain.cols = kLarge;
  EXPECT(kimi_newton_schulz_workspace_bytes(&chain, KIMI_DEVICE_CPU) == kTooMany);
  chain.rows = chain.cols = 1 << 20;  // a number still
  const size_t bytes = kimi_newton_schulz_workspace_bytes(&chain, KIMI_DEVICE_CPU);
  EXPECT(bytes > size_t{1} << 42 && bytes < size_t{1} << 50);
  EXPECT(kimi_set_num_threads(threads) == KIMI_OK);
}

// A params struct of which only some fields were set: what is 0 by accident has an answer.
void test_what_is_left_zero_is_refused() {
  Gate gate;
  gate.p.logits_stride = 0;
  EXPECT(gate.run() == KIMI_INVALID_ARGUMENT);
  EXPECT(error_has("topk_gate: logits_stride: expected the distance between its elements, got 0"));
  gate.p.num_tokens = 1;  // of one row no distance is asked
  EXPECT(gate.run() == KIMI_OK);
  gate.p.scaling_factor = 0;
  EXPECT(gate.run() == KIMI_INVALID_ARGUMENT && error_has("scaling_factor: expected a number"));

  float x[64] = {}, y[64] = {};
  int32_t map[8] = {}, source[8] = {}, end = 8;
  kimi_permute_params copy = {};
  copy.x = x, copy.y = y, copy.row_map = map, copy.source = source;
  copy.num_tokens = copy.num_rows = 8, copy.top_k = 1, copy.row_bytes = 16;
  EXPECT(kimi_permute(&copy, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT &&
         error_has("permute: x_stride_bytes: expected"));
  kimi_unpermute_params sum = {};
  sum.x = x, sum.y = y, sum.row_map = map, sum.num_tokens = 8, sum.top_k = 1, sum.hidden = 4;
  EXPECT(kimi_unpermute(&sum, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT &&
         error_has("unpermute: y_stride: expected"));

  kimi_grouped_gemm_params product = {};
  product.a = x, product.b = x, product.out = y, product.offsets = &end;
  product.num_rows = 8, product.k = 4, product.n = 2, product.num_experts = 1;
  const kimi::test::Workspace workspace(product, kimi_grouped_gemm_workspace_bytes);
  const auto refused = [&](const char* text) {
    return kimi_grouped_gemm(&product, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT &&
           error_has(text);
  };
  EXPECT(refused("a_row_stride, a_k_stride: expected"));
  product.a_row_stride = 4, product.a_k_stride = 1;
  EXPECT(refused("b_expert_stride, b_k_stride, b_n_stride: expected"));
  product.b_n_stride = 4;  // one row for all of K: meant so
  EXPECT(kimi_grouped_gemm(&product, KIMI_DEVICE_CPU, nullptr) == KIMI_OK);

  kimi_matrix_product_params d = {};
  d.a = x, d.b = x, d.d = y, d.rows = d.cols = d.depth = 4, d.d_stride = 4;
  const kimi::test::Workspace scratch(d, kimi_matrix_product_workspace_bytes);
  EXPECT(kimi_matrix_product(&d, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT &&
         error_has("alpha, beta, delta: expected one other than 0"));
  d.alpha = 1;
  EXPECT(kimi_matrix_product(&d, KIMI_DEVICE_CPU, nullptr) == KIMI_INVALID_ARGUMENT &&
         error_has("a_row_stride, a_col_stride: expected"));
}

template <class Params>
bool says_what_is_missing(kimi_status (*op)(const Params*, kimi_device, void*)) {
  const Params zero = {};
  const kimi_status status = op(&zero, KIMI_DEVICE_CPU, nullptr);
  return status == KIMI_INVALID_ARGUMENT && error_has("expected");
}

// All of it left zero: refused wherever that is not simply the empty call.
void test_nothing_but_zeros_is_refused() {
  EXPECT(says_what_is_missing(kimi_topk_gate));
  EXPECT(says_what_is_missing(kimi_topk_gate_given));
  EXPECT(says_what_is_missing(kimi_topk_gate_backward));
  EXPECT(says_what_is_missing(kimi_gate_plan));
  EXPECT(says_what_is_missing(kimi_sequence_balance_loss));
  EXPECT(says_what_is_missing(kimi_sequence_balance_loss_backward));
  EXPECT(says_what_is_missing(kimi_z_loss));
  EXPECT(says_what_is_missing(kimi_z_loss_backward));
  EXPECT(says_what_is_missing(kimi_permute_plan));
  EXPECT(says_what_is_missing(kimi_permute));
  EXPECT(says_what_is_missing(kimi_unpermute));
  EXPECT(says_what_is_missing(kimi_unpermute_backward));
  EXPECT(says_what_is_missing(kimi_grouped_gemm));
  EXPECT(says_what_is_missing(kimi_grouped_gemm_wgrad));
  EXPECT(says_what_is_missing(kimi_grouped_gemm_fp8));
  EXPECT(says_what_is_missing(kimi_fused_experts));
  EXPECT(says_what_is_missing(kimi_fused_experts_backward));
  EXPECT(says_what_is_missing(kimi_newton_schulz));
  EXPECT(says_what_is_missing(kimi_attention_max_logits));
  EXPECT(says_what_is_missing(kimi_clip_rows));
  EXPECT(says_what_is_missing(kimi_clip_factor));
}

}  // namespace

int main() {
  test_refusals();
  test_sizes_are_refused_below_python_too();
  test_given_ids_and_the_backward_refuse();
  test_losses_refuse_sizes_and_say_their_workspace();
  test_fp8_products_refuse_what_tma_cannot_read();
  test_products_want_memory_of_their_own();
  test_workspaces_are_checked();
  test_sizes_of_no_memory();
  test_what_is_left_zero_is_refused();
  test_nothing_but_zeros_is_refused();
  return kimi::test::report("c_api_refusals");
}
