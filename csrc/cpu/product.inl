// Matrix products with one operand (the weight) decoded a panel at a time into scratch that stays in the L2 cache, and
// the other (the activations) laid out as tiles beforehand. Included once per instruction set.
//
// A task is a panel of 16 * tiles rows (or columns) of the weight. It goes along the contraction in blocks of
// kBlockSteps: the block of the panel is decoded, and multiplied with pairs of activation tiles, which fit the L1
// cache (2 * 16 KiB). The floor is that of the tile products; the weight is decoded once for kChunkRows rows.

// A sum of products: weight w against up to three activation operands that share it.
struct Segment {
  Source w;
  const uint32_t* act[3] = {};
  int acts = 1;
  bool interleaved = false;
  int64_t steps = 0;
  bool floats = false;     // in a product of pairs: this one is of floats
  bool then_mask = false;  // after this segment, the sum is masked (and scaled) by the task's dropout
};

// What is added to every output: the adapter's s B h and the bias.
struct Extra {
  const float* h = nullptr;  // (rows, rank), scaled; rows of `stride`, a multiple of 16, zeros beyond the rank
  int64_t stride = 0;
  Matrix b;  // (out_features, rank)
  int64_t rank = 0;
  const void* bias = nullptr;
  Type bias_type = Type::f32;
};

// Where the result goes. transposed: rows of a result tile are columns of `data`.
struct Out {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t rows = 0, cols = 0;
  bool transposed = false;
  float scale = 1.0f;
  Extra extra;
};

// Adds B h to a tile of y: rows of h by rows of B.
inline void add_adapter(const Extra& extra, float* tile, int64_t rows, int64_t row0, int n, int64_t col0) {
  for (int64_t r0 = 0; r0 < extra.rank; r0 += 16) {
    const int count = static_cast<int>(extra.rank - r0 < 16 ? extra.rank - r0 : 16);
    alignas(64) float b[kTile] = {}, turned[kTile];
    for (int j = 0; j < n; ++j)
      load_up_to_16(extra.b.data, extra.b.type, (col0 + j) * extra.rank + r0, count, b + 16 * j);
    transpose16(reinterpret_cast<const uint32_t*>(b), reinterpret_cast<uint32_t*>(turned));
    for (int64_t m = 0; m < rows; ++m) {
      const float* h = extra.h + (row0 + m) * extra.stride + r0;
      for (int i = 0; i < count; ++i)
        for (int j = 0; j < 16; ++j) tile[16 * m + j] += turned[16 * i + j] * h[i];
    }
  }
}

inline void store_tile(const Out& out, float* tile, int64_t tile_row, int64_t tile_col) {
  alignas(64) float turned[kTile];
  int64_t row0 = tile_row, col0 = tile_col;
  if (out.transposed) {
    alignas(64) uint32_t in[kTile], to[kTile];
    memcpy(in, tile, sizeof in);
    transpose16(in, to);
    memcpy(turned, to, sizeof to);
    tile = turned;
    row0 = tile_col;
    col0 = tile_row;
  }
  const int64_t rows = out.rows - row0 < 16 ? out.rows - row0 : 16, left = out.cols - col0;
  if (rows <= 0 || left <= 0) return;
  const int n = static_cast<int>(left < 16 ? left : 16);
  float bias[16] = {};
  if (out.extra.bias != nullptr) load_up_to_16(out.extra.bias, out.extra.bias_type, col0, n, bias);
  add_adapter(out.extra, tile, rows, row0, n, col0);
  for (int64_t r = 0; r < rows; ++r) {
    float v[16];
    for (int j = 0; j < 16; ++j) v[j] = tile[16 * r + j] * out.scale + bias[j];
    store_up_to_16(out.data, out.type, (row0 + r) * out.cols + col0, n, v);
  }
}

inline void mask_tile(const Dropout& dropout, float* tile, int64_t row0, int64_t col0) {
  for (int r = 0; r < 16; ++r) {
    const uint32_t key = dropout.row_key(row0 + r);
    for (int j = 0; j < 16; ++j)
      tile[16 * r + j] = dropout.keep(key, col0 + j) ? tile[16 * r + j] * dropout.scale : 0.0f;
  }
}

#if PE_LEVEL >= 4
constexpr int64_t kMostDirect = 4;  // tiles of sums that stay in registers

// c = an interleaved NF4 segment's product for kTiles of the weight and kActs of the activations, at most 4 sums. The
// decoded weight never leaves the L1 cache, nor a sum its register, and the tile unit multiplies the 128 values before
// while four rows are decoded. Floor: to decode 128 values takes 12 cycles (measured alone), a tile product 19.
template <int kTiles, int kActs>
inline void nf4_product_direct(const Matrix& w, int64_t row0, const uint32_t* act, int64_t act_stride, float* c) {
  constexpr int64_t kSteps = 4, kTileStride = kSteps * kTile;
  const int64_t blocks = w.cols / 64, row_bytes = w.cols / 2;
  const int64_t rows = w.rows - row0 < 16 * kTiles ? w.rows - row0 : 16 * kTiles;
  uint32_t* buffers = scratch<uint32_t>(Slot::panel, 2 * kTiles * kTileStride + kTiles * 16 * blocks);
  float* scales = reinterpret_cast<float*>(buffers + 2 * kTiles * kTileStride);
  read_scales(w, row0 * w.cols, rows * blocks, scales);
  if (rows < 16 * kTiles) memset(buffers, 0, 2 * kTiles * kTileStride * sizeof(uint32_t));
  const uint8_t* packed = static_cast<const uint8_t*>(w.data) + row0 * row_bytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  // One round more than blocks: it multiplies the last.
  for (int64_t b = 0, round = 0; b < blocks + 2; b += 2, ++round) {
    uint32_t* to = buffers + (round & 1) * kTiles * kTileStride;
    const uint32_t* left = buffers + (~round & 1) * kTiles * kTileStride;
    const uint32_t* right = act + (round - 1) * kTileStride;
    // 512 bytes on in the row, or at the start of the row that the next task has in its place
    const int64_t ahead = b * 32 + 512 < row_bytes ? 512 : 512 - row_bytes + 16 * kTiles * row_bytes;
    for (int group = 0; group < 4 * kTiles; ++group) {  // four rows to decode, a tile to multiply
      const int64_t r0 = 4 * group, left_rows = b < blocks ? rows - r0 : 0;
      uint32_t* out = to + r0 / 16 * kTileStride + r0 % 16 * 16;
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        if (i >= left_rows) break;
        const uint8_t* from = packed + (r0 + i) * row_bytes + b * 32;
        _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T0);
        __m512i v[4];
        const float* scale = scales + (r0 + i) * blocks + b;
        if (b + 1 < blocks) decode128(from, scale, true, v);
        else decode128(from, scale, false, v);
        for (int q = 0; q < 4; ++q) _mm512_store_si512(out + q * kTile + 16 * i, v[q]);
      }
      if (round == 0) continue;
      const int tile = group % kTiles, step = group / kTiles;
      const uint32_t *a = left + tile * kTileStride + step * kTile, *x = right + step * kTile;
      if (tile == 0) multiply_tile<0, kActs>(a, x, act_stride);
      if constexpr (kTiles > 1)
        if (tile == 1) multiply_tile<kActs, kActs>(a, x, act_stride);
      if constexpr (kTiles > 2) {
        if (tile == 2) multiply_tile<2, 1>(a, x, act_stride);
        if (tile == 3) multiply_tile<3, 1>(a, x, act_stride);
      }
    }
  }
  _tile_stored(0, c, 64);
  if constexpr (kTiles * kActs > 1) _tile_stored(1, c + kTile, 64);
  if constexpr (kTiles * kActs > 2) _tile_stored(2, c + 2 * kTile, 64);
  if constexpr (kTiles * kActs > 3) _tile_stored(3, c + 3 * kTile, 64);
}

inline void nf4_product_direct(const Matrix& w, int64_t panel0, int64_t panel_tiles, int64_t acts, const uint32_t* act,
                               int64_t act_stride, float* c) {
  const auto run = [&](auto tiles, auto columns) {
    nf4_product_direct<decltype(tiles)::value, decltype(columns)::value>(w, panel0 * 16, act, act_stride, c);
  };
  using std::integral_constant;
  if (acts == 1 && panel_tiles == 1) run(integral_constant<int, 1>(), integral_constant<int, 1>());
  else if (acts == 1 && panel_tiles == 2) run(integral_constant<int, 2>(), integral_constant<int, 1>());
  else if (acts == 1 && panel_tiles == 3) run(integral_constant<int, 3>(), integral_constant<int, 1>());
  else if (acts == 1) run(integral_constant<int, 4>(), integral_constant<int, 1>());
  else if (acts == 2 && panel_tiles == 1) run(integral_constant<int, 1>(), integral_constant<int, 2>());
  else if (acts == 2) run(integral_constant<int, 2>(), integral_constant<int, 2>());
  else if (acts == 3) run(integral_constant<int, 1>(), integral_constant<int, 3>());
  else run(integral_constant<int, 1>(), integral_constant<int, 4>());
}
#endif

// Where a panel of the weight stands in the tile products.
enum class Panel {
  rows_left,      // y^T = W x^T, the contraction along the weight's rows
  rows_right,     // y = x W^T, the same
  columns_right,  // dx = dy W, the contraction down its columns
};

// Whether products of pairs run on the tile unit.
template <bool kPairs>
constexpr bool kTileUnit = PE_LEVEL >= 4 && kPairs;

// c += a segment's product for weight tiles [panel0, panel0 + panel_tiles) and activation tiles [act0, act0 + acts).
template <bool kPairs, Panel kPanel>
inline void add_segment(const Segment& s, int64_t panel0, int64_t panel_tiles, int64_t act0, int64_t acts,
                        int64_t block_steps, float* c) {
  const int64_t act_stride = s.steps * kTile;
#if PE_LEVEL >= 4
  if (kPairs && kPanel == Panel::rows_left && s.interleaved && s.acts == 1 && s.w.m.type == Type::nf4 &&
      acts * panel_tiles <= kMostDirect) {
    nf4_product_direct(s.w.m, panel0, panel_tiles, acts, s.act[0] + act0 * act_stride, act_stride, c);
    return;
  }
#endif
  const int64_t filled = kPanel == Panel::columns_right ? (panel_tiles + 3) / 4 * 4 : panel_tiles;
  uint32_t* panel = scratch<uint32_t>(Slot::panel, filled * block_steps * kTile);
  for (int64_t step0 = 0; step0 < s.steps; step0 += block_steps) {
    const int64_t steps = s.steps - step0 < block_steps ? s.steps - step0 : block_steps, stride = steps * kTile;
    if constexpr (kPanel == Panel::rows_left)
      left_panel<kPairs>(s.w, s.interleaved, panel0 * 16, panel_tiles, step0, steps, panel);
    else if constexpr (kPanel == Panel::rows_right)
      right_panel_of_rows<kPairs>(s.w, s.interleaved, panel0 * 16, panel_tiles, step0, steps, panel);
    else right_panel<kPairs>(s.w, panel0 * 16, filled, step0, steps, panel);
    for (int k = 0; k < s.acts; ++k) {
      for (int64_t t = 0; t < acts; t += 2) {
        const int64_t pair = acts - t < 2 ? 1 : 2;
        const uint32_t* act = s.act[k] + (act0 + t) * act_stride + step0 * kTile;
        if constexpr (kPanel == Panel::rows_left)
          multiply<kPairs, true>(panel, stride, panel_tiles, act, act_stride, pair, steps, c + t * kTile, acts * kTile);
        else
          multiply<kPairs, false>(act, act_stride, pair, panel, stride, panel_tiles, steps, c + t * panel_tiles * kTile,
                                  panel_tiles * kTile);
      }
    }
  }
}

// Weight tiles [panel0, panel0 + panel_tiles) against activation tiles [act0, act1), whose first row in `out` is act_row0.
template <bool kPairs, Panel kPanel>
inline void product_task(const Segment* segments, int count, int64_t panel0, int64_t panel_tiles, int64_t act0,
                         int64_t act1, int64_t act_row0, int64_t block_steps, const Dropout& dropout, const Out& out) {
  const int64_t acts = act1 - act0;
  if (acts <= 0 || panel_tiles <= 0) return;
  float* c = scratch<float>(Slot::accumulators, panel_tiles * acts * kTile);
  memset(c, 0, static_cast<size_t>(panel_tiles * acts * kTile) * sizeof(float));
  for (int i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    if (kPairs && s.floats) add_segment<false, kPanel>(s, panel0, panel_tiles, act0, acts, block_steps, c);
    else add_segment<kPairs, kPanel>(s, panel0, panel_tiles, act0, acts, block_steps, c);
    if (s.then_mask) {
      for (int64_t t = 0; t < acts; ++t)
        for (int64_t p = 0; p < panel_tiles; ++p)
          mask_tile(dropout, c + (t * panel_tiles + p) * kTile, act_row0 + (act0 + t) * 16, (panel0 + p) * 16);
    }
  }
  for (int64_t t = 0; t < acts; ++t) {
    for (int64_t p = 0; p < panel_tiles; ++p) {
      const int64_t act_row = act_row0 + (act0 + t) * 16, panel_row = (panel0 + p) * 16;
      if constexpr (kPanel == Panel::rows_left) store_tile(out, c + (p * acts + t) * kTile, panel_row, act_row);
      else store_tile(out, c + (t * panel_tiles + p) * kTile, act_row, panel_row);
    }
  }
}

constexpr int64_t kBlockSteps = 16;
constexpr int64_t kChunkRows = 512;

// How a product is cut into tasks for the threads: panels of the weight, and groups of activation tiles where the panels
// alone are not shared out evenly.
struct Plan {
  int64_t panel_tiles = 0, panels = 0, groups = 0, group_tiles = 0, block_steps = 0;
  int64_t all_panel_tiles, all_act_tiles;

  Plan(int64_t weight_rows, int64_t act_tiles, int64_t threads, int64_t most_tiles, bool in_fours) {
    all_panel_tiles = (weight_rows + 15) / 16;
    all_act_tiles = act_tiles;
    const bool few = act_tiles <= 2;
#if PE_LEVEL >= 4
    const bool direct = !in_fours && act_tiles > 0 && act_tiles <= kMostDirect;
    const int64_t most = direct ? kMostDirect / act_tiles : few ? 4 : most_tiles, unit = in_fours ? 4 : direct ? 1 : 2;
#else
    const int64_t most = few ? 4 : most_tiles, unit = in_fours ? 4 : 2;
#endif
    const int64_t least = (all_panel_tiles + most - 1) / most;
    int64_t rounded = least;
    if (least >= threads) rounded = (least + threads - 1) / threads * threads;
    else if (all_panel_tiles >= threads * unit) rounded = threads;
    // A number of panels that the threads share evenly, and the least; with as many groups as leave the busiest thread at
    // most a sixteenth more than its part.
    Plan best = *this;
    int64_t best_work = -1;
    for (const int64_t count : {rounded, least}) {
      panel_tiles = ((all_panel_tiles + count - 1) / count + unit - 1) / unit * unit;
      panels = panel_tiles == 0 ? 0 : (all_panel_tiles + panel_tiles - 1) / panel_tiles;
      for (int64_t more = 1; more == 1 || (more <= act_tiles / 2 && more <= threads); ++more) {
        group_tiles = ((act_tiles + more - 1) / more + 1) / 2 * 2;
        groups = group_tiles == 0 ? 0 : (act_tiles + group_tiles - 1) / group_tiles;
        const int64_t work = busiest(threads);
        if (best_work < 0 || work < best_work) {
          best = *this;
          best_work = work;
        }
        if (16 * work * threads <= 17 * all_panel_tiles * act_tiles) break;
      }
      if (16 * best_work * threads <= 17 * all_panel_tiles * act_tiles) break;
    }
    *this = best;
    block_steps = few ? 32 : kBlockSteps;
  }
  int64_t tasks() const { return panels * groups; }

  // The work of the thread that has most, in products of two tiles; each has as many tasks, one after another.
  int64_t busiest(int64_t threads) const {
    const int64_t each = (tasks() + threads - 1) / threads;
    int64_t most = 0, work = 0;
    for (int64_t task = 0; task < tasks(); ++task) {
      if (task % each == 0) work = 0;
      const int64_t p = all_panel_tiles - task % panels * panel_tiles, a = all_act_tiles - task / panels * group_tiles;
      work += (p < panel_tiles ? p : panel_tiles) * (a < group_tiles ? a : group_tiles);
      most = work > most ? work : most;
    }
    return most;
  }
};

template <bool kPairs, Panel kPanel>
inline void run_task(const Plan& plan, int64_t task, const Segment* segments, int count, int64_t act_row0,
                     const Dropout& dropout, const Out& out) {
  const int64_t p0 = task % plan.panels * plan.panel_tiles, a0 = task / plan.panels * plan.group_tiles;
  const int64_t p_left = plan.all_panel_tiles - p0, a_left = plan.all_act_tiles - a0;
  product_task<kPairs, kPanel>(segments, count, p0, p_left < plan.panel_tiles ? p_left : plan.panel_tiles, a0,
                               a0 + (a_left < plan.group_tiles ? a_left : plan.group_tiles), act_row0, plan.block_steps,
                               dropout, out);
}
