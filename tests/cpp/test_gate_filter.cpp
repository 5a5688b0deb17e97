// SPDX-License-Identifier: MIT
// The estimates by which the gate's filter leaves experts out, against the scores: every engine of
// this machine, a dense sample of logits, all 2^32 with KIMI_OPS_EVERY_LOGIT=1 (minutes).
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/features.h"
#include "cpu/vec_portable.h"
#include "math/functions.h"
#include "topk_gate/topk_gate.h"

namespace {

using namespace kimi;

struct Named {
  const char* name;
  const gate::CpuEngine* engine;
};
std::vector<Named> engines() {
  std::vector<Named> all;
#if defined(KIMI_OPS_X86)
  if (cpu::detected_isa() >= KIMI_ISA_AVX2) all.push_back({"avx2", &gate::kAvx2Engine});
  if (cpu::detected_isa() >= KIMI_ISA_AVX512) all.push_back({"avx512", &gate::kAvx512Engine});
#endif
  return all;
}

TEST(estimates_keep_their_bound) {
  constexpr int64_t kBlock = 4096;
  const uint64_t step = std::getenv("KIMI_OPS_EVERY_LOGIT") ? 1 : 2047;
  std::vector<float> logits, estimates(kBlock);
  const auto compare = [&] {
    for (const Named& named : engines()) {
      named.engine->estimate(logits.data(), int64_t(logits.size()), estimates.data());
      for (size_t i = 0; i < logits.size(); ++i) {
        const float score = math::sigmoid<cpu::Portable>(logits[i]), a = estimates[i];
        const bool nan = logits[i] != logits[i];
        // One rounding of each behind a bias, which may be as large as the estimate allows.
        const double most = double(named.engine->error) - 0x1p-23;
        if (nan ? a == a : !(std::abs(double(a) - double(score)) <= most))
          check::fail(__FILE__, __LINE__,
                      std::string(named.name) + ": logit of bits " +
                          std::to_string(bits_of(logits[i])) + ": estimate " + std::to_string(a));
      }
    }
    logits.clear();
  };
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += step) {
    logits.push_back(float_of(uint32_t(bits)));
    if (logits.size() == kBlock) compare();
  }
  for (uint32_t payload : {0u, 1u, 0x1ffu, 0x3fffffu})
    for (uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7f800001u})
      logits.push_back(float_of(nan | payload));
  for (float x : {1.0f, -1.0f}) logits.push_back(x * std::numeric_limits<float>::infinity());
  compare();
}

TEST(errors_are_those_of_the_filter) {
  for (const Named& named : engines())
    CHECK(named.engine->error >= 0x1p-21f && named.engine->error <= 0x1p-4f);
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
