// Includes the file SUKHOPS_BODY once per instruction set, each copy in a namespace of its own.
// A body is plain loops over the lanes of vec.h: no STL and no shared inline templates, which the
// linker would merge across instruction sets. SUKHOPS_BEST(f) is f from the best set this CPU has.
#include <cmath>
#include <cstdint>

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SUKHOPS_X86 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace sukhops::avx512 {
constexpr int kRegisters = 32;  // of sixteen floats
constexpr int64_t kRegisterBytes = 64;
#include "vec.h"
#include SUKHOPS_BODY
}  // namespace sukhops::avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace sukhops::avx2 {
constexpr int kRegisters = 8;  // of sixteen floats
constexpr int64_t kRegisterBytes = 32;
#include "vec.h"
#include SUKHOPS_BODY
}  // namespace sukhops::avx2
#pragma GCC pop_options
#endif

namespace sukhops::base {
constexpr int kRegisters = 4;  // of sixteen floats
constexpr int64_t kRegisterBytes = 16;
#include "vec.h"
#include SUKHOPS_BODY
}  // namespace sukhops::base

#ifdef SUKHOPS_X86
#define SUKHOPS_BEST(...)                                              \
  (sukhops::cpu_isa() == sukhops::Isa::avx512 ? &avx512::__VA_ARGS__   \
   : sukhops::cpu_isa() == sukhops::Isa::avx2 ? &avx2::__VA_ARGS__     \
                                              : &base::__VA_ARGS__)
#else
#define SUKHOPS_BEST(...) (&base::__VA_ARGS__)
#endif
#undef SUKHOPS_BODY
