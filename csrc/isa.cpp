// Selects the instruction set of the kernels. `python -m sukhops info` prints it.
#include "common.h"

#include <string>

namespace sukhops {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

// the newest instruction set of this CPU; test builds set another with -DSUKHOPS_ISA=avx2 or base
Isa newest_isa() {
#ifdef SUKHOPS_ISA
  return Isa::SUKHOPS_ISA;
#elif defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::base;
}

// The fastest instruction set of this CPU. AMD cores multiply pairs of bfloat16 at twice the rate of float32. Intel's
// vector units multiply them at half that rate (Emerald Rapids: 85 GFLOP/s per core, against 171 in float32), so they
// use AVX-512 without pairs.
Isa fastest_isa() {
#ifdef __x86_64__
  if (newest_isa() == Isa::avx512_bf16 && !__builtin_cpu_is("amd")) return Isa::avx512;
#endif
  return newest_isa();
}

std::atomic<Isa>& selected_isa() {
  static std::atomic<Isa> isa{fastest_isa()};
  return isa;
}

std::vector<std::string> cpu_isas() {
  return {kNames, kNames + static_cast<int>(newest_isa()) + 1};
}

void use_cpu_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(newest_isa()); ++i)
    if (name == kNames[i]) return selected_isa().store(static_cast<Isa>(i));
  STD_TORCH_CHECK(false, "name: expected one of torch.ops.sukhops.cpu_isas(), got ", name);
}

std::string cpu_capability() {
  return fast_bfloat16() ? "avx512 + bfloat16 products" : kNames[static_cast<int>(cpu_isa())];
}

}  // namespace

Isa cpu_isa() { return selected_isa().load(std::memory_order_relaxed); }

bool fast_bfloat16() { return cpu_isa() == Isa::avx512_bf16; }

}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&sukhops::cpu_capability));
  m.impl("cpu_isas", TORCH_BOX(&sukhops::cpu_isas));
  m.impl("use_cpu_isa", TORCH_BOX(&sukhops::use_cpu_isa));
}
