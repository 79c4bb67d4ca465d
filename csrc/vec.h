// Vectors of sixteen float32 in the compiler's vector extension, which the compiler lowers to the registers of the
// target. Included by isa.h inside a namespace per instruction set: no includes and no include guard. isa.h defines
// kRegisterBytes, the width of the target's registers, before.
#define SUKHOPS_INLINE static inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;
typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

SUKHOPS_INLINE vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

SUKHOPS_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }

SUKHOPS_INLINE vf splat(float a) {
  return vf{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a};
}

// bfloat16 is stored as its bits
SUKHOPS_INLINE void store(uint16_t* p, vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const vu kept = x == x ? rounded : (bits >> 16) | 0x40u;          // keeps NaN
  const vh h = __builtin_convertvector(kept, vh);
  __builtin_memcpy(p, &h, sizeof h);
}

SUKHOPS_INLINE float to_float(float x) { return x; }
SUKHOPS_INLINE double to_float(double x) { return x; }
SUKHOPS_INLINE float to_float(uint16_t h) {
  const uint32_t bits = (uint32_t)h << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

SUKHOPS_INLINE float to_float(HalfBits h) {
  const uint32_t magnitude = h.bits & 0x7fffu, sign = (h.bits & 0x8000u) << 16;
  uint32_t bits = magnitude << 13;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  x *= 5.192296858534828e33f;  // 2^112 corrects the exponent, also of denormals
  __builtin_memcpy(&bits, &x, sizeof x);
  bits |= sign | (magnitude >= 0x7c00u ? 0x7f800000u : 0u);
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

SUKHOPS_INLINE void put(float* p, float x) { *p = x; }
SUKHOPS_INLINE void put(double* p, double x) { *p = x; }
SUKHOPS_INLINE void put(uint16_t* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  *p = (uint16_t)(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}

// Vectors that fill one register of the target. A vector of sixteen lanes would pass through memory on targets with
// narrower registers.
template <class A>
struct Register;
template <>
struct Register<float> {
  typedef float type __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t ints __attribute__((vector_size(kRegisterBytes)));
  typedef uint16_t halves __attribute__((vector_size(kRegisterBytes / 2)));
  static constexpr int64_t lanes = kRegisterBytes / 4;
};
template <>
struct Register<double> {
  typedef double type __attribute__((vector_size(kRegisterBytes)));
  typedef int64_t ints __attribute__((vector_size(kRegisterBytes)));
  static constexpr int64_t lanes = kRegisterBytes / 8;
};

// loads and stores a vector; by default the vector fills one register
template <class V, class A>
SUKHOPS_INLINE V get(const A* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class A>
SUKHOPS_INLINE typename Register<A>::type get(const A* p) {
  return get<typename Register<A>::type>(p);
}

template <class A, class V>
SUKHOPS_INLINE void set(A* p, V x) {
  __builtin_memcpy(p, &x, sizeof x);
}

SUKHOPS_INLINE void store(HalfBits* p, vf x) {
  const vu bits = (vu)x, magnitude = bits & 0x7fffffffu;
  const vu normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const vu denormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;  // adding 1/2 rounds to the last bit of a denormal
  const vu large = magnitude > 0x7f800000u ? vu{} + 0x7e00u : vu{} + 0x7c00u;
  const vu rounded = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? denormal : normal;
  const vh h = __builtin_convertvector(rounded | (bits >> 16 & 0x8000u), vh);
  __builtin_memcpy(p, &h, sizeof h);
}

// loads a register of numbers and converts them to the accumulation type
SUKHOPS_INLINE Register<float>::type widened(const float* p) { return get(p); }
SUKHOPS_INLINE Register<double>::type widened(const double* p) { return get(p); }
SUKHOPS_INLINE Register<float>::type widened(const uint16_t* p) {
  const auto h = get<Register<float>::halves>(p);
  return (Register<float>::type)(__builtin_convertvector(h, Register<float>::ints) << 16);
}
SUKHOPS_INLINE Register<float>::type widened(const HalfBits* p) {
  typedef Register<float>::type F;
  typedef Register<float>::ints I;
  const I bits = __builtin_convertvector(get<Register<float>::halves>((const uint16_t*)p), I);
  F x = (F)((bits & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112 corrects the exponent, also of denormals
  x = (bits & 0x7c00) == 0x7c00 ? (F)((I)x | 0x7f800000) : x;
  return (F)((I)x | ((bits & 0x8000) << 16));
}

// the lanes `i` of x and y, where the lanes of y are numbered after those of x
template <int... i, class V>
SUKHOPS_INLINE V shuffle(V x, V y) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, i...);
#else
  return __builtin_shuffle(x, y, decltype(x == y){i...});
#endif
}

// rounds to nearest, ties to even; keeps NaN
SUKHOPS_INLINE void put(HalfBits* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u) {  // 65536 and above
    p->bits = (uint16_t)(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
  } else if (magnitude < 0x38800000u) {  // denormal: adding 1/2 rounds to its last bit
    float small;
    __builtin_memcpy(&small, &magnitude, sizeof small);
    small += 0.5f;
    uint32_t rounded;
    __builtin_memcpy(&rounded, &small, sizeof rounded);
    p->bits = (uint16_t)(sign | (rounded - 0x3f000000u));
  } else {
    p->bits = (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
  }
}

// Keeps a vector in a register. Otherwise the compiler may load it from memory again for every product.
template <class V>
SUKHOPS_INLINE void hold(V& x) {
#ifdef __x86_64__
  if constexpr (sizeof(V) == kRegisterBytes) asm("" : "+v"(x));
#elif defined(__aarch64__)
  if constexpr (sizeof(V) == kRegisterBytes) asm("" : "+w"(x));
#endif
}

// Rounds the product x before it is added to another: keeps the compiler from fusing the product with the sum.
template <class V>
SUKHOPS_INLINE V rounded(V x) {
#if defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
  return __builtin_assoc_barrier(x);
#else
  asm("" : "+m"(x));
  return x;
#endif
}

// exp for x <= 88, with an error of about 1 ulp. Exactly 0 below -87.3; keeps NaN.
SUKHOPS_INLINE Register<float>::type register_exp(Register<float>::type x) {
  typedef Register<float>::type F;
  typedef Register<float>::ints I;
  const I tiny = x < -87.3f;
  const F magic = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const F t = x * 1.44269504088896341f + magic;
  const I n = (I)t - (I)magic;
  const F k = t - magic;
  F r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  F p = F{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return tiny ? F{} : p * (F)((n + 127) << 23);
}

SUKHOPS_INLINE Register<double>::type register_exp(Register<double>::type x) {
  for (int64_t i = 0; i < Register<double>::lanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

SUKHOPS_INLINE vf vexp(vf x) {
  constexpr int64_t n = Register<float>::lanes;
  Register<float>::type part[kLanes / n];
  __builtin_memcpy(part, &x, sizeof x);
  for (int64_t i = 0; i < kLanes / n; ++i) part[i] = register_exp(part[i]);
  __builtin_memcpy(&x, part, sizeof x);
  return x;
}

// tanh with an error of a few ulp: an odd polynomial near 0, exp elsewhere; keeps NaN
SUKHOPS_INLINE vf vtanh(vf x) {
  const vf a = x < 0.0f ? -x : x;
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  const vf e = vexp(a > 20.0f ? splat(40.0f) : a + a);
  const vf big = 1.0f - 2.0f / (e + 1.0f);
  return a < 0.625f ? p : (x < 0.0f ? -big : big);
}

// adds the upper half of the lanes to the lower half until four lanes are left
SUKHOPS_INLINE float reduce_add(vf x) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 a, b;
  __builtin_memcpy(&a, &x, 32);
  __builtin_memcpy(&b, (const char*)&x + 32, 32);
  a += b;
  v4 c, d;
  __builtin_memcpy(&c, &a, 16);
  __builtin_memcpy(&d, (const char*)&a + 16, 16);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

SUKHOPS_INLINE float reduce_add(float __attribute__((vector_size(32))) x) {
  typedef float v4 __attribute__((vector_size(16)));
  v4 a, b;
  __builtin_memcpy(&a, &x, 16);
  __builtin_memcpy(&b, (const char*)&x + 16, 16);
  a += b;
  return (a[0] + a[2]) + (a[1] + a[3]);
}

SUKHOPS_INLINE float reduce_add(float __attribute__((vector_size(16))) x) { return (x[0] + x[2]) + (x[1] + x[3]); }

SUKHOPS_INLINE float reduce_max(vf x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
