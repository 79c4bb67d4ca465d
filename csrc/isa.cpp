// Which instruction set the kernels use, and what python -m sukhops info says of it.
#include "common.h"

#include <string>

namespace sukhops {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

// the last one that this CPU has, or that a build for tests is limited to with -DSUKHOPS_ISA=avx2 or base
Isa last() {
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

// AMD's cores multiply pairs of bfloat16 at twice the rate of float32, Intel's vector units at half of it (Emerald Rapids:
// 85 and 171 GFLOP/s a core)
Isa best() {
#ifdef __x86_64__
  if (last() == Isa::avx512_bf16 && !__builtin_cpu_is("amd")) return Isa::avx512;
#endif
  return last();
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

std::vector<std::string> cpu_isas() {
  return {kNames, kNames + static_cast<int>(last()) + 1};
}

void use_cpu_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(last()); ++i)
    if (name == kNames[i]) return chosen().store(static_cast<Isa>(i));
  STD_TORCH_CHECK(false, "name: expected one of torch.ops.sukhops.cpu_isas(), got ", name);
}

std::string cpu_capability() {
  return fast_bfloat16() ? "avx512 + bfloat16 products" : kNames[static_cast<int>(cpu_isa())];
}

}  // namespace

Isa cpu_isa() { return chosen().load(std::memory_order_relaxed); }

bool fast_bfloat16() { return cpu_isa() == Isa::avx512_bf16; }

}  // namespace sukhops

STABLE_TORCH_LIBRARY_IMPL(sukhops, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&sukhops::cpu_capability));
  m.impl("cpu_isas", TORCH_BOX(&sukhops::cpu_isas));
  m.impl("use_cpu_isa", TORCH_BOX(&sukhops::use_cpu_isa));
}
