// Passes over one row of logits, which is padded with -inf to a multiple of kLanes. Included by the bodies of isa.h
// inside a namespace per instruction set: no includes and no include guard.

static inline float row_max(const float* x, int64_t width) {
  vf m = load(x);
  for (int64_t j = kLanes; j < width; j += kLanes) {
    const vf v = load(x + j);
    m = v > m ? v : m;
  }
  return reduce_max(m);
}

static inline double row_max(const double* x, int64_t width) {
  double m = x[0];
  for (int64_t j = 1; j < width; ++j) m = x[j] > m ? x[j] : m;
  return m;
}

// x = exp(x - shift); returns the sum
static inline float exp_row(float* x, int64_t width, float shift) {
  vf s = splat(0.0f);
  for (int64_t j = 0; j < width; j += kLanes) {
    const vf e = vexp(load(x + j) - shift);
    store(x + j, e);
    s += e;
  }
  return reduce_add(s);
}

static inline double exp_row(double* x, int64_t width, double shift) {
  double s = 0.0;
  for (int64_t j = 0; j < width; ++j) s += x[j] = std::exp(x[j] - shift);
  return s;
}

template <class A>
static inline void store_row(A* z, const A* x, int64_t width) {
  int64_t j = 0;
  if constexpr (sizeof(A) == 4) {
    for (; j + kLanes <= width; j += kLanes) store(z + j, load(x + j));
  }
  for (; j < width; ++j) z[j] = x[j];
}

// Merges logits into the k largest of their row. These are in descending order; of equal logits the one with the lower
// index comes first.
template <class A>
static inline void keep_top(
    const A* x, int64_t width, int64_t v0, A* value, int64_t* index, int64_t k) {
  for (int64_t j0 = 0; j0 < width; j0 += 64) {
    const int64_t j1 = j0 + 64 < width ? j0 + 64 : width;
    if (!(row_max(x + j0, j1 - j0) > value[k - 1])) continue;
    for (int64_t j = j0; j < j1; ++j) {
      if (!(x[j] > value[k - 1])) continue;
      int64_t at = k - 1;
      for (; at > 0 && x[j] > value[at - 1]; --at) {
        value[at] = value[at - 1];
        index[at] = index[at - 1];
      }
      value[at] = x[j];
      index[at] = v0 + j;
    }
  }
}

// x = z + bias; the float version pads the last vector with zeros
static inline void load_row(const float* z, float* x, int64_t width, const float* bias) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store(x + j, bias ? load(z + j) + load(bias + j) : load(z + j));
  if (j < width) store(x + j, vf{});
  for (; j < width; ++j) x[j] = z[j] + (bias ? bias[j] : 0.0f);
}

static inline void load_row(const double* z, double* x, int64_t width, const double* bias) {
  for (int64_t j = 0; j < width; ++j) x[j] = z[j] + (bias ? bias[j] : 0.0);
}

// the classifier logits c of a shared head, from its LM logits u
template <class A>
static inline void shift_row(const A* u, A* c, int64_t width, A scale, A shift) {
  for (int64_t j = 0; j < width; ++j) c[j] = scale * u[j] + shift;
}
