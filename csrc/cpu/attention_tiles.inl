// What attention and prefix_attention share: products of packed operands, and the pieces of a softmax over intervals of
// keys. Included once per instruction set.
//
// Operands are 32-bit words: one float, or (W = 2, bf16 where the instruction set multiplies it) two bf16 neighbours
// along the contraction. The right operand lies in panels of kPanel columns, each contiguous along the contraction, so
// that a product reads it from front to back; the left one is read a word at a time, with any strides.
#include "cpu/vector.inl"

#if PE_LEVEL >= 2
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;
constexpr int kPanel = kTileVectors * kWidth;  // at most kMostPanel
// Words of a contraction that are summed on their own: a longer sum loses more to rounding, and a longer piece of a
// panel leaves the L1 cache before the next rows read it. Without fused multiply-adds each step loses twice.
constexpr int64_t kPiece = PE_LEVEL == 0 ? 16 : 64;

// The lowest level at which bf16 stays in pairs. Lowered, the pairs are computed without the instruction: slow, and the
// way to run their code on a machine that has none.
#ifndef PE_PAIRS_LEVEL
#define PE_PAIRS_LEVEL 3
#endif

// Values of storage type T in a word of an operand.
template <class T>
constexpr int kPerWord = PE_LEVEL >= PE_PAIRS_LEVEL && T::type == Type::bf16 ? 2 : 1;

inline Words load_words(const uint32_t* p) {
  Words out;
  memcpy(&out, p, sizeof(out));
  return out;
}

template <int W>
PE_INLINE Floats multiply_words(Words a, Words b, Floats sum) {
  if constexpr (W == 1) return multiply_add((Floats)a, (Floats)b, sum);
#if PE_LEVEL >= 3
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum = multiply_add((Floats)(a & 0xFFFF0000), (Floats)(b & 0xFFFF0000), sum);
  return multiply_add((Floats)(a << 16), (Floats)(b << 16), sum);
#endif
}

// C (ROWS x VECTORS * kWidth) = or += A B over `depth` words, B one panel from the column on that C begins with.
template <int W, int ROWS, int VECTORS>
inline void tile(int64_t depth, const void* a, int64_t a_row, int64_t a_depth, const uint32_t* b, float* c,
                 int64_t c_stride, bool add) {
  Floats sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Words row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) row[v] = load_words(b + k * kPanel + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      uint32_t word;
      memcpy(&word, static_cast<const char*>(a) + 4 * (r * a_row + k * a_depth), 4);
      const Words one = Words{} + word;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = multiply_words<W>(one, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      float* at = c + r * c_stride + v * kWidth;
      // Added last: a sum of block sums has a smaller rounding error than one long chain.
      store<F32>(at, add ? load<F32>(at) + sums[r][v] : sums[r][v]);
    }
}

template <int W, int VECTORS>
inline void tile_rows(int64_t rows, int64_t depth, const void* a, int64_t a_row, int64_t a_depth, const uint32_t* b,
                      float* c, int64_t c_stride, bool add) {
  switch (rows) {
    case 1:
      return tile<W, 1, VECTORS>(depth, a, a_row, a_depth, b, c, c_stride, add);
    case 2:
      return tile<W, 2, VECTORS>(depth, a, a_row, a_depth, b, c, c_stride, add);
    case 3:
      return tile<W, 3, VECTORS>(depth, a, a_row, a_depth, b, c, c_stride, add);
    case 4:
      return tile<W, 4, VECTORS>(depth, a, a_row, a_depth, b, c, c_stride, add);
    case 5:
      return tile<W, 5, VECTORS>(depth, a, a_row, a_depth, b, c, c_stride, add);
    default:
      return tile<W, 6, VECTORS>(depth, a, a_row, a_depth, b, c, c_stride, add);
  }
}

template <int W, int VECTORS>
inline void panel_product(int64_t rows, int64_t depth, const void* a, int64_t a_row, int64_t a_depth, const uint32_t* b,
                          float* c, int64_t c_stride, bool add) {
  int64_t k = 0;
  do {
    const int64_t piece = depth - k < kPiece ? depth - k : kPiece;
    for (int64_t i = 0; i < rows; i += kTileRows)
      tile_rows<W, VECTORS>(rows - i < kTileRows ? rows - i : kTileRows, piece,
                            static_cast<const char*>(a) + 4 * (i * a_row + k * a_depth), a_row, a_depth, b + k * kPanel,
                            c + i * c_stride, c_stride, add || k > 0);
    k += piece;
  } while (k < depth);
}

// C (rows x columns) = or += A (rows x depth words) B; columns is a multiple of 16, B's panels are b_panel words apart.
template <int W>
inline void product(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row, int64_t a_depth,
                    const uint32_t* b, int64_t b_panel, float* c, int64_t c_stride, bool add) {
  for (int64_t j = 0; j < columns; j += kPanel, b += b_panel, c += kPanel) {
    const int64_t vectors = (columns - j) / kWidth;
    if (vectors >= kTileVectors) panel_product<W, kTileVectors>(rows, depth, a, a_row, a_depth, b, c, c_stride, add);
    if constexpr (kTileVectors == 4) {
      if (vectors == 3) panel_product<W, 3>(rows, depth, a, a_row, a_depth, b, c, c_stride, add);
      if (vectors == 2) panel_product<W, 2>(rows, depth, a, a_row, a_depth, b, c, c_stride, add);
      if (vectors == 1) panel_product<W, 1>(rows, depth, a, a_row, a_depth, b, c, c_stride, add);
    }
  }
}

// --- from tensors to operands and back --------------------------------------------------------------------------------

template <class T>
inline typename T::Value* row_of(const Heads4& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<typename T::Value*>(x.data) + b * x.batch + h * x.head + t * x.token;
}

template <class From, class To>
inline Floats load_as(const typename From::Value* p, int64_t n) {
  const Floats v = load<From>(p, n);
  if constexpr (From::type == To::type || To::type == Type::f32) return v;
  typename To::Value rounded[kWidth];
  store<To>(rounded, v);
  return load<To>(rounded);
}

// One row of head_dim values as words, zeros up to `width` values; From is what is stored, To what it is rounded to.
template <class From, class To>
inline void read_row(const typename From::Value* row, int64_t head_dim, int64_t width, uint32_t* out) {
  for (int64_t d = 0; d < width; d += kWidth) {
    const Floats v = d < head_dim ? load_as<From, To>(row + d, head_dim - d) : Floats{};
    if constexpr (kPerWord<To> == 2) store<Bf16>(reinterpret_cast<uint16_t*>(out) + d, v);
    else store<F32>(reinterpret_cast<float*>(out) + d, v);
  }
}

template <class T>
inline void write_row(typename T::Value* row, int64_t head_dim, float scale, const float* in) {
  for (int64_t d = 0; d < head_dim; d += kWidth) store<T>(row + d, load<F32>(in + d) * scale, head_dim - d);
}

// 16 rows that were read (`stride` words apart) as columns `first` to first + 16 of a right operand of `depth` words.
inline void put_across(const uint32_t* rows, int64_t stride, int64_t depth, int64_t first, uint32_t* out) {
  constexpr int kPiece = kPanel < 16 ? kPanel : 16;
  for (int64_t i = 0; i < 16; i += kPiece) {
    uint32_t* to = out + (first + i) / kPanel * kPanel * depth + (first + i) % kPanel;
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t j = 0; j < kPiece; ++j) to[d * kPanel + j] = rows[(i + j) * stride + d];
  }
}

// Two rows of bf16, `width` values each (a multiple of 16), as pairs.
inline Words pair_up(const uint32_t* low, const uint32_t* high, int64_t d) {
  Halves l, h;
  memcpy(&l, reinterpret_cast<const uint16_t*>(low) + d, sizeof(l));
  memcpy(&h, reinterpret_cast<const uint16_t*>(high) + d, sizeof(h));
  return __builtin_convertvector(l, Words) | __builtin_convertvector(h, Words) << 16;
}

// `count` rows that were read (a multiple of W) as rows `first` on of a right operand whose contraction runs over
// `depth` words of rows; `width` columns.
template <int W>
inline void put_along(const uint32_t* rows, int64_t stride, int64_t count, int64_t first, int64_t depth, int64_t width,
                      uint32_t* out) {
  for (int64_t r = 0; r < count; r += W) {
    const uint32_t* row = rows + r * stride;
    for (int64_t d = 0; d < width; d += kWidth) {
      uint32_t* to = out + (d / kPanel * depth + (first + r) / W) * kPanel + d % kPanel;
      Words words;
      if constexpr (W == 1) words = load_words(row + d);
      else words = pair_up(row, row + stride, d);
      memcpy(to, &words, sizeof(words));
    }
  }
}

// --- softmax ----------------------------------------------------------------------------------------------------------

// Positions of a row that lie inside [first, last), as all ones; `at` is the index of the vector's first.
inline Ints inside(int64_t at, int64_t first, int64_t last) {
  Ints index;
  for (int i = 0; i < kWidth; ++i) index[i] = i;
  index += static_cast<int32_t>(at);
  return (index >= static_cast<int32_t>(first)) & (index < static_cast<int32_t>(last));
}

inline Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }

inline float largest(Floats v) {
  float out = v[0];
  for (int i = 1; i < kWidth; ++i) out = v[i] > out ? v[i] : out;
  return out;
}

// e^x for x up to 80: `exponential` without what larger ones ask for. Below -87.3 it is 0; a NaN stays one.
inline Floats exponential_below(Floats x) {
  const Floats shifter = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = multiply_add(x, all(1.44269504088896341f), shifter) - shifter;
  const Floats r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), x));
  Floats p = all(1.9875691500e-4f);
  p = multiply_add(p, r, all(1.3981999507e-3f));
  p = multiply_add(p, r, all(8.3334519073e-3f));
  p = multiply_add(p, r, all(4.1665795894e-2f));
  p = multiply_add(p, r, all(1.6666665459e-1f));
  p = multiply_add(p, r, all(5.0000001201e-1f));
  p = multiply_add(p * r, r, r) + 1.0f;
  const Floats power = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
  return x < all(-87.3f) ? all(0.0f) : p * power;
}
