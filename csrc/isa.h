// Includes the file SUKHOPS_BODY once per instruction set, each copy in its own namespace. A body consists of plain
// loops over the lanes of vec.h. It must not use the STL or shared inline templates: the linker would merge their
// copies across instruction sets. SUKHOPS_BEST(f) is the address of f for the selected instruction set. If
// SUKHOPS_PAIRS is defined, the body is also compiled with kPairs = true, as avx512bf16::f, for CPUs that multiply
// pairs of bfloat16.
#include <cmath>
#include <cstdint>

#include "common.h"

#define SUKHOPS_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define SUKHOPS_TARGET(t) SUKHOPS_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define SUKHOPS_TARGET_END SUKHOPS_PRAGMA(clang attribute pop)
#else
#define SUKHOPS_TARGET(t) SUKHOPS_PRAGMA(GCC push_options) SUKHOPS_PRAGMA(GCC target(t))
#define SUKHOPS_TARGET_END SUKHOPS_PRAGMA(GCC pop_options)
#endif

#ifdef __x86_64__
#define SUKHOPS_X86 1
#include <immintrin.h>

SUKHOPS_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace sukhops::avx512 {
constexpr int kRegisters = 32;
constexpr int64_t kRegisterBytes = 64;
constexpr bool kPairs = false;
#include "vec.h"
#include SUKHOPS_BODY
}  // namespace sukhops::avx512
SUKHOPS_TARGET_END
#ifdef SUKHOPS_PAIRS
SUKHOPS_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
namespace sukhops::avx512bf16 {
constexpr int kRegisters = 32;
constexpr int64_t kRegisterBytes = 64;
constexpr bool kPairs = true;
#include "vec.h"
#include SUKHOPS_BODY
}  // namespace sukhops::avx512bf16
SUKHOPS_TARGET_END
#endif
SUKHOPS_TARGET("avx2,fma")
namespace sukhops::avx2 {
constexpr int kRegisters = 16;
constexpr int64_t kRegisterBytes = 32;
constexpr bool kPairs = false;
#include "vec.h"
#include SUKHOPS_BODY
}  // namespace sukhops::avx2
SUKHOPS_TARGET_END
#endif

namespace sukhops::base {
#ifdef __aarch64__
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int64_t kRegisterBytes = 16;
constexpr bool kPairs = false;
#include "vec.h"
#include SUKHOPS_BODY
}  // namespace sukhops::base

#ifdef SUKHOPS_X86
#define SUKHOPS_BEST(...)                                              \
  (sukhops::cpu_isa() >= sukhops::Isa::avx512 ? &avx512::__VA_ARGS__   \
   : sukhops::cpu_isa() == sukhops::Isa::avx2 ? &avx2::__VA_ARGS__     \
                                              : &base::__VA_ARGS__)
#else
#define SUKHOPS_BEST(...) (&base::__VA_ARGS__)
#endif
#undef SUKHOPS_BODY
#undef SUKHOPS_PAIRS
