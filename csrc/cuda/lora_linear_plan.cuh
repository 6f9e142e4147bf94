// How lora_linear.cu divides its work over thread blocks, and where what they exchange lies in the workspace.
//
// W is cut into tiles of rows and units of 64 columns. The units, tile after tile, are dealt out evenly and in order:
// a worker takes a run of them, so it holds a part of a tile, perhaps whole tiles, and a part of another, and every
// worker has the same to read whatever n and k are. What it sums of one tile is a segment, which goes to the workspace.
#pragma once

#include "launch.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnit = 64;     // columns: one block of NF4 at least, so that a unit of a row has one scale
constexpr int kMaxRows = 64;  // of x
constexpr int kMaxRank = 64;
constexpr int kMaxPieces = 32;    // that x A^T is cut into
constexpr int kCounters = 16384;  // 4, and one for each tile

// Rows of W: two tiles of mma for each warp, so that what is read of x serves both. The lookups and the reads of x share
// the port of shared memory, which one tile with 8 rows of x keeps busy for 25 cycles a unit, two for 21.
constexpr int kWeightTiles = 2;
constexpr int kTileRows = 16 * kWarps * kWeightTiles;

// Thread blocks on a multiprocessor: what the registers allow, by the number of n-tiles of mma, 8 rows of x each.
__host__ __device__ constexpr int resident(int x_tiles) { return x_tiles <= 2 ? 2 : 1; }

inline int x_tiles_of(int rows) { return rows <= 8 ? 1 : rows <= 16 ? 2 : rows <= 32 ? 4 : 8; }

struct Plan {
  unsigned tiles;    // of rows of W
  unsigned units;    // in a row
  unsigned workers;  // thread blocks that multiply
  unsigned share;    // units of each worker; the first `extra` have one more
  unsigned extra;
  unsigned pieces;  // thread blocks that compute x A^T, a piece of k each

  __host__ __device__ unsigned start(unsigned worker) const {
    return worker * share + (worker < extra ? worker : extra);
  }
  // The worker whose run holds this unit.
  __host__ __device__ unsigned worker_of(unsigned unit) const {
    const unsigned longer = extra * (share + 1);
    return unit < longer ? unit / (share + 1) : extra + (unit - longer) / share;
  }
};

// One wave of thread blocks, no more than have a unit each. Those that compute x A^T start first and are few: pieces of
// 256 columns, since the reading of less is over sooner than it starts, and of 64 where a column is much arithmetic.
inline Plan plan_of(int rows, int64_t n, int64_t k, int rank, int multiprocessors, int blocks_on_each) {
  Plan plan{};
  plan.tiles = static_cast<unsigned>((n + kTileRows - 1) / kTileRows);
  plan.units = static_cast<unsigned>(k / kUnit);
  const unsigned blocks = static_cast<unsigned>(multiprocessors * blocks_on_each);
  if (rank > 0) {
    const unsigned at_once = rows * rank >= 1024 ? 1 : 4;
    plan.pieces = (plan.units + at_once - 1) / at_once;
    if (plan.pieces > kMaxPieces) plan.pieces = kMaxPieces;
    if (plan.pieces > blocks / 4) plan.pieces = blocks / 4 > 0 ? blocks / 4 : 1;
  }
  const unsigned all = plan.tiles * plan.units;
  plan.workers = blocks > plan.pieces ? blocks - plan.pieces : 1;
  if (plan.workers > all) plan.workers = all;
  plan.share = all / plan.workers;
  plan.extra = all % plan.workers;
  return plan;
}

// The workspace: counters of arrivals, which are 0 between launches whatever the shapes were; x A^T and its pieces,
// (rows, rank) each; the segments, (rows padded, kTileRows) each. Worker w's segment of tile t is number w + t: no two
// are the same, for from one segment to the next in order w or t grows.
struct Workspace {
  unsigned* pieces_done;
  unsigned* h_there;  // 1 when x A^T is in h
  unsigned* tiles_done;
  unsigned* started;  // thread blocks of a launch in which some wait for others
  unsigned* tile_arrivals;
  float* h;
  float* pieces;
  float* segments;
};

__host__ __device__ inline Workspace workspace_at(void* base) {
  unsigned* counters = static_cast<unsigned*>(base);
  float* h = reinterpret_cast<float*>(counters + kCounters);
  constexpr int kSize = kMaxRows * kMaxRank;
  return {counters,     counters + 1,
          counters + 2, counters + 3,
          counters + 4, h,
          h + kSize,    h + static_cast<int64_t>(kSize) * (1 + kMaxPieces)};
}

inline int64_t fixed_bytes() { return 4 * (kCounters + static_cast<int64_t>(kMaxRows) * kMaxRank * (1 + kMaxPieces)); }

inline int64_t workspace_bytes(const Plan& plan, int x_tiles) {
  return fixed_bytes() + 4 * static_cast<int64_t>(plan.workers + plan.tiles) * 8 * x_tiles * kTileRows;
}

}  // namespace
