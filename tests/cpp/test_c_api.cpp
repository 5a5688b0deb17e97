// SPDX-License-Identifier: MIT
// The C API: results, ISA choice, threads, and a device that is not there.
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "c_api.h"

namespace {

using kimi::test::error_has;
using kimi::test::Gate;

void test_result_is_independent_of_isa_and_threads() {
  Gate want;
  EXPECT(kimi_set_isa(KIMI_ISA_PORTABLE) == KIMI_OK);
  EXPECT(want.run() == KIMI_OK);
  int total = 0;
  for (int32_t n : want.counts) total += n;
  EXPECT(total == Gate::kTokens * Gate::kK);
  for (int isa = KIMI_ISA_PORTABLE; isa <= kimi_detected_isa(); ++isa) {
    for (int threads : {1, 2, 5}) {
      Gate got;
      EXPECT(kimi_set_isa(kimi_isa(isa)) == KIMI_OK);
      EXPECT(kimi_set_num_threads(threads) == KIMI_OK && kimi_num_threads() == threads);
      EXPECT(got.run() == KIMI_OK);
      EXPECT(got.indices == want.indices && got.counts == want.counts);
      EXPECT(std::memcmp(got.weights.data(), want.weights.data(),
                         sizeof(float) * want.weights.size()) == 0);
    }
  }
  EXPECT(kimi_set_num_threads(0) == KIMI_OK && kimi_num_threads() >= 1);
}

void test_calls_at_once() {
  Gate gates[4] = {Gate(0), Gate(1), Gate(2), Gate(3)},
       alone[4] = {Gate(0), Gate(1), Gate(2), Gate(3)};
  for (Gate& gate : alone) EXPECT(gate.run() == KIMI_OK);
  EXPECT(alone[0].indices != alone[1].indices && alone[2].indices != alone[3].indices);
  std::vector<std::thread> threads;
  kimi_status status[4] = {};
  for (int i = 0; i < 4; ++i) threads.emplace_back([&, i] { status[i] = gates[i].run(); });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 4; ++i) {
    EXPECT(status[i] == KIMI_OK);
    EXPECT(gates[i].indices == alone[i].indices && gates[i].counts == alone[i].counts);
    EXPECT(gates[i].weights == alone[i].weights);
  }
}

// Ids that are no expert's, in buffers of exactly their size (AddressSanitizer watches): the bits
// of the portable engine, and nothing for a token that has no other.
void test_backward_leaves_out_slots_without_an_expert() {
  Gate gate;
  EXPECT(gate.run() == KIMI_OK);
  const int32_t bad[] = {-1, 100000000, Gate::kExperts, INT32_MIN};
  const int places[][3] = {{0, 0, 0}, {1, 1, 1}, {7, 7, 7}, {0, 1, 7}};
  for (int t = 1; t < Gate::kTokens; ++t)
    for (int place : places[t % 4]) gate.indices[t * Gate::kK + place] = bad[t / 4 % 4];
  for (int j = 0; j < Gate::kK; ++j) gate.indices[j] = -1 - j;
  for (int function = 0; function < 3; ++function) {
    std::vector<float> want, got(gate.logits.size());
    kimi_topk_gate_backward_params p = {};
    p.grad_weights = gate.weights.data();
    p.logits = gate.logits.data();
    p.indices = gate.indices.data();
    p.num_tokens = Gate::kTokens;
    p.logits_stride = p.num_experts = Gate::kExperts;
    p.top_k = Gate::kK;
    p.renormalize = 1;
    p.scaling_factor = 1.0f;
    p.score_function = kimi_score_function(function);
    const kimi_isa current = kimi_current_isa();
    for (int isa = KIMI_ISA_PORTABLE; isa <= kimi_detected_isa(); ++isa) {
      got.assign(gate.logits.size(), -7.0f);
      p.grad_logits = got.data();
      EXPECT(kimi_set_isa(kimi_isa(isa)) == KIMI_OK);
      EXPECT(kimi_topk_gate_backward(&p, KIMI_DEVICE_CPU, nullptr) == KIMI_OK);
      if (want.empty()) want = got;
      EXPECT(std::memcmp(got.data(), want.data(), sizeof(float) * got.size()) == 0);
      for (int e = 0; e < Gate::kExperts; ++e) EXPECT(got[e] == 0.0f);
    }
    EXPECT(kimi_set_isa(current) == KIMI_OK);
  }
}

// A build without CUDA says so; a build with it says that the runtime found no device.
void test_cuda_without_a_device() {
  if (std::strlen(kimi_cuda_architectures()) == 0) {
    Gate gate;
    EXPECT(gate.run(KIMI_DEVICE_CUDA) == KIMI_UNSUPPORTED);
    EXPECT(error_has("this build has no CUDA kernels") && error_has("KIMI_OPS_CUDA=on"));
  }
}

void test_environment_forces_the_isa() {
  const char* wanted = std::getenv("KIMI_OPS_ISA");
  const kimi_isa isa = kimi_current_isa();
  if (!wanted) EXPECT(isa == kimi_detected_isa());
  if (wanted && std::strcmp(wanted, "portable") == 0) EXPECT(isa == KIMI_ISA_PORTABLE);
  if (wanted && std::strcmp(wanted, "avx2") == 0 && kimi_detected_isa() >= KIMI_ISA_AVX2) {
    EXPECT(isa == KIMI_ISA_AVX2 && std::strcmp(kimi_cpu_engine("topk_gate"), "avx2") == 0);
  }
  EXPECT(kimi_cpu_engine("no_such_op") == nullptr);
}

}  // namespace

int main() {
  test_environment_forces_the_isa();
  test_result_is_independent_of_isa_and_threads();
  test_calls_at_once();
  test_backward_leaves_out_slots_without_an_expert();
  test_cuda_without_a_device();
  return kimi::test::report("c_api");
}
