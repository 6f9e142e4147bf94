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
  bool then_mask = false;  // after this segment, the sum is masked (and scaled) by the task's dropout
};

// Where the result goes. transposed: rows of a result tile are columns of `data`.
struct Out {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t rows = 0, cols = 0;
  bool transposed = false;
  float scale = 1.0f;
  const void* bias = nullptr;
  Type bias_type = Type::f32;
};

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
  if (out.bias != nullptr) load_up_to_16(out.bias, out.bias_type, col0, n, bias);
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

// Weight tiles [panel0, panel0 + panel_tiles) against activation tiles [act0, act1), whose first row in `out` is act_row0.
// kPanelLeft: y^T = W x^T, the contraction along the weight's rows. Else: dx = dy W, the contraction down its columns.
template <bool kPairs, bool kPanelLeft>
inline void product_task(const Segment* segments, int count, int64_t panel0, int64_t panel_tiles, int64_t act0,
                         int64_t act1, int64_t act_row0, int64_t block_steps, const Dropout& dropout, const Out& out) {
  const int64_t acts = act1 - act0, filled = kPanelLeft ? panel_tiles : (panel_tiles + 3) / 4 * 4;
  if (acts <= 0 || panel_tiles <= 0) return;
  float* c = scratch<float>(Slot::accumulators, panel_tiles * acts * kTile);
  uint32_t* panel = scratch<uint32_t>(Slot::panel, filled * block_steps * kTile);
  memset(c, 0, static_cast<size_t>(panel_tiles * acts * kTile) * sizeof(float));
  for (int i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    const int64_t act_stride = s.steps * kTile;
    for (int64_t step0 = 0; step0 < s.steps; step0 += block_steps) {
      const int64_t steps = s.steps - step0 < block_steps ? s.steps - step0 : block_steps;
      if constexpr (kPanelLeft) left_panel<kPairs>(s.w, s.interleaved, panel0 * 16, panel_tiles, step0, steps, panel);
      else right_panel<kPairs>(s.w, panel0 * 16, filled, step0, steps, panel);
      for (int k = 0; k < s.acts; ++k) {
        for (int64_t t = 0; t < acts; t += 2) {
          const int64_t pair = acts - t < 2 ? 1 : 2;
          const uint32_t* act = s.act[k] + (act0 + t) * act_stride + step0 * kTile;
          if constexpr (kPanelLeft)
            multiply<kPairs>(panel, steps * kTile, panel_tiles, act, act_stride, pair, steps, c + t * kTile,
                             acts * kTile);
          else
            multiply<kPairs>(act, act_stride, pair, panel, steps * kTile, panel_tiles, steps,
                             c + t * panel_tiles * kTile, panel_tiles * kTile);
        }
      }
    }
    if (s.then_mask) {
      for (int64_t t = 0; t < acts; ++t)
        for (int64_t p = 0; p < panel_tiles; ++p)
          mask_tile(dropout, c + (t * panel_tiles + p) * kTile, act_row0 + (act0 + t) * 16, (panel0 + p) * 16);
    }
  }
  for (int64_t t = 0; t < acts; ++t) {
    for (int64_t p = 0; p < panel_tiles; ++p) {
      const int64_t act_row = act_row0 + (act0 + t) * 16, panel_row = (panel0 + p) * 16;
      if constexpr (kPanelLeft) store_tile(out, c + (p * acts + t) * kTile, panel_row, act_row);
      else store_tile(out, c + (t * panel_tiles + p) * kTile, act_row, panel_row);
    }
  }
}

constexpr int64_t kBlockSteps = 16;
constexpr int64_t kChunkRows = 512;

// How a product is cut into tasks for the threads: panels of the weight, and groups of activation tiles where there are
// fewer panels than threads.
struct Plan {
  int64_t panel_tiles, panels, groups, group_tiles, block_steps;
  int64_t all_panel_tiles, all_act_tiles;

  Plan(int64_t weight_rows, int64_t act_tiles, int64_t threads, int64_t most_tiles, bool in_fours) {
    all_panel_tiles = (weight_rows + 15) / 16;
    all_act_tiles = act_tiles;
    const bool few = act_tiles <= 2;
    const int64_t most = few ? 4 : most_tiles, unit = in_fours ? 4 : 2;
    panels = (all_panel_tiles + most - 1) / most;
    if (panels >= threads) panels = (panels + threads - 1) / threads * threads;
    else if (all_panel_tiles >= threads * unit) panels = threads;
    panel_tiles = ((all_panel_tiles + panels - 1) / panels + unit - 1) / unit * unit;
    panels = (all_panel_tiles + panel_tiles - 1) / panel_tiles;
    groups = panels >= threads ? 1 : (threads + panels - 1) / panels;
    group_tiles = ((act_tiles + groups - 1) / groups + 1) / 2 * 2;
    groups = group_tiles == 0 ? 0 : (act_tiles + group_tiles - 1) / group_tiles;
    block_steps = few ? 32 : kBlockSteps;
  }
  int64_t tasks() const { return panels * groups; }
};

template <bool kPairs, bool kPanelLeft>
inline void run_task(const Plan& plan, int64_t task, const Segment* segments, int count, int64_t act_row0,
                     const Dropout& dropout, const Out& out) {
  const int64_t p0 = task / plan.groups * plan.panel_tiles, a0 = task % plan.groups * plan.group_tiles;
  const int64_t p_left = plan.all_panel_tiles - p0, a_left = plan.all_act_tiles - a0;
  product_task<kPairs, kPanelLeft>(segments, count, p0, p_left < plan.panel_tiles ? p_left : plan.panel_tiles, a0,
                                   a0 + (a_left < plan.group_tiles ? a_left : plan.group_tiles), act_row0,
                                   plan.block_steps, dropout, out);
}
