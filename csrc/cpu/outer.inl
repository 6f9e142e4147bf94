// The adapter's weight gradients: sums over the rows of a product of two rows. Included once per instruction set.

// Rows whose products are summed before they join the result: short sums lose less to rounding.
constexpr int64_t kOuterRows = 64;
// Ranks at a time: as many sums as registers hold.
constexpr int kOuterRanks = PE_LEVEL >= 2 ? 16 : 8;

// tile[r][j] += sum over m < rows of g[m][r] z[m][j] for kRanks of the 16 r and n of the 16 j. g is 16 floats a row.
template <class T, int kRanks, bool kWhole>
inline void outer_vector(const float* g, const typename T::Value* z, int64_t stride, int64_t rows, int64_t n,
                         float* tile) {
  Floats acc[kRanks];
  for (int r = 0; r < kRanks; ++r) acc[r] = all(0.0f);
  for (int64_t m = 0; m < rows; ++m) {
    const Floats v = kWhole ? load<T>(z + m * stride) : load<T>(z + m * stride, n);
#pragma GCC unroll 16
    for (int r = 0; r < kRanks; ++r) acc[r] = multiply_add(all(g[16 * m + r]), v, acc[r]);
  }
  for (int r = 0; r < kRanks; ++r) store<F32>(tile + 16 * r, load<F32>(tile + 16 * r) + acc[r]);
}

template <class T, int kRanks>
inline void outer_block(const float* g, const typename T::Value* z, int64_t stride, int64_t rows, int64_t n,
                        float* tile) {
  for (int64_t j = 0; j < n; j += kWidth) {
    if (n - j >= kWidth) outer_vector<T, kRanks, true>(g, z + j, stride, rows, n, tile + j);
    else outer_vector<T, kRanks, false>(g, z + j, stride, rows, n - j, tile + j);
  }
}

template <class T>
inline void outer_block(const float* g, const typename T::Value* z, int64_t stride, int64_t rows, int64_t n,
                        int64_t ranks, float* tile) {
  for (int64_t r = 0; r < ranks; r += kOuterRanks) {
    if (kOuterRanks == 16 && ranks - r <= 8) outer_block<T, 8>(g + r, z, stride, rows, n, tile + 16 * r);
    else outer_block<T, kOuterRanks>(g + r, z, stride, rows, n, tile + 16 * r);
  }
}

// out = g^T z for columns [begin, end) by sixteens of z (rows, cols), with g (rows, padded rank) in blocks of 16 ranks:
// block b at g + b * rows * 16, zeros beyond the rank.
inline void outer_columns(const float* g, int64_t rank, const Source& z, int64_t begin, int64_t end, const Out& out) {
  const int64_t rows = z.m.rows, blocks = (rank + 15) / 16;
  float* sums = scratch<float>(Slot::accumulators, (end - begin) * blocks * kTile);
  memset(sums, 0, static_cast<size_t>((end - begin) * blocks * kTile) * sizeof(float));
  float* masked = z.dropout.on ? scratch<float>(Slot::panel, kOuterRows * 64) : nullptr;
  for (int64_t m = 0; m < rows; m += kOuterRows) {
    const int64_t count = rows - m < kOuterRows ? rows - m : kOuterRows;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t col = 16 * t, left = z.m.cols - col, n = left < 16 ? left : 16;
      if (masked != nullptr && (t == begin || t % 4 == 0))
        for (int64_t i = 0; i < count; ++i) read64(z, m + i, t / 4 * 64, masked + 64 * i);
      for (int64_t b = 0; b < blocks; ++b) {
        const float* part = g + (b * rows + m) * 16;
        float* tile = sums + ((t - begin) * blocks + b) * kTile;
        const int64_t ranks = rank - 16 * b < 16 ? rank - 16 * b : 16;
        if (masked != nullptr) {
          outer_block<F32>(part, masked + t % 4 * 16, 64, count, n, ranks, tile);
          continue;
        }
        with_type(z.m.type, [&](auto type) {
          using T = decltype(type);
          const auto* from = static_cast<const typename T::Value*>(z.m.data) + m * z.m.cols + col;
          outer_block<T>(part, from, z.m.cols, count, n, ranks, tile);
        });
      }
    }
  }
  for (int64_t t = begin; t < end; ++t)
    for (int64_t b = 0; b < blocks; ++b) store_tile(out, sums + ((t - begin) * blocks + b) * kTile, 16 * b, 16 * t);
}

// (rows, rank) as outer_columns takes it.
inline float* in_blocks_of_16(const float* g, int64_t rows, int64_t rank, float* out) {
  for (int64_t b = 0; 16 * b < rank; ++b) {
    const int64_t n = rank - 16 * b < 16 ? rank - 16 * b : 16;
    for (int64_t m = 0; m < rows; ++m) {
      float* to = out + (b * rows + m) * 16;
      memcpy(to, g + m * rank + 16 * b, static_cast<size_t>(n) * sizeof(float));
      memset(to + n, 0, static_cast<size_t>(16 - n) * sizeof(float));
    }
  }
  return out;
}
