// Sixteen float32 lanes in the compiler's own vector type, which it lowers to whatever the current
// target has. Included by isa.h inside a namespace per instruction set, so: no includes, no guard.
#define SUKHOPS_INLINE static inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
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

// bfloat16 is kept as its bits
SUKHOPS_INLINE vf load(const uint16_t* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

SUKHOPS_INLINE void store(uint16_t* p, vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const vu kept = x == x ? rounded : (bits >> 16) | 0x40u;          // a NaN stays one
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

SUKHOPS_INLINE void put(float* p, float x) { *p = x; }
SUKHOPS_INLINE void put(double* p, double x) { *p = x; }
SUKHOPS_INLINE void put(uint16_t* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  *p = (uint16_t)(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}

// exp to about 1 ulp; below -87.3 exactly 0; NaN stays NaN. For arguments up to 88.
SUKHOPS_INLINE vf vexp(vf x) {
  const vi tiny = x < -87.3f;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf t = x * 1.44269504088896341f + magic;
  const vi n = (vi)t - (vi)magic;
  const vf k = t - magic;
  vf r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return tiny ? vf{} : p * (vf)((n + 127) << 23);
}

// tanh to a few ulp: an odd polynomial near 0, the exponential elsewhere; NaN stays NaN
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

// halves are added until four lanes are left
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

SUKHOPS_INLINE float reduce_max(vf x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
