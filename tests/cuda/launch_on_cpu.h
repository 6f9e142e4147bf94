// A launch on the CPU: blocks of fibres, their barriers, warps and shared memory. What cuda_on_cpu.h is built on.
//
// Environment, read at each launch:
//   PE_CPU_SEED             the order of blocks and of the threads in them: 0 (the default) as they come, else shuffled;
//                           -1: the last block first
//   PE_CPU_BLOCKS           blocks that run at the same time, by turns (1); always 1 under ThreadSanitizer, which sees
//                           a race between blocks in any order
//   PE_CPU_LAST             runs only so many of the last blocks of a grid, so that huge ones can be tested
//   PE_CPU_MULTIPROCESSORS  what the device has (132): it says so
//   PE_CPU_NO_IMAGE         set: the library has no code for the device
//   PE_CPU_ROOM             the blocks that it holds where some wait for others: one on each multiprocessor, or fewer, as
//                           where another stream's kernel has the rest
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "cuda_numbers_on_cpu.h"

namespace pe_cpu {

struct Block;
struct Fibre;

struct Copy {  // a cp.async under way
  void* shared;
  const void* global;
  int bytes, group;
};

struct Thread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  int rank = 0;  // in its block; the lane is rank % 32
  Block* block = nullptr;
  Fibre* fibre = nullptr;
  std::vector<Copy> copies;
  int group = 0;  // the cp.async group being filled
  const char* waits_at = nullptr;

  // For ThreadSanitizer: the thread, what it had done at its last fence, and what atomics gave it since then.
  void* identity = nullptr;
  void *fenced = nullptr, *unfenced = nullptr;
  bool has_fenced = false;
  uint64_t fence_token = 0, unfenced_token = 0;
};

extern Thread* self;  // the running thread
constexpr int kMultiprocessors = 132;

struct LaunchInfo {
  const char* kernel = nullptr;
  dim3 grid, block;
  size_t shared_bytes = 0;
  void* stream = nullptr;
  int device = 0;
};
extern LaunchInfo last_launch;

// Runs body() once for each thread. `function` is the kernel's address, by which its attributes are kept.
void launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const std::function<void()>& body);

[[noreturn]] void fail(const char* format, ...);  // ends the launch with cudaErrorLaunchFailure
const char* message();                            // why the last launch failed
void* dynamic_shared();
size_t static_shared_bytes();
bool in_shared(const void* address);
void* barrier_token();  // holds what the block did up to its last __syncthreads

void block_barrier();
void spin();  // in a loop that waits for a counter: lets other threads run, and blocks that have not started
void warp_barrier(unsigned mask);
enum class Collective { sync, shuffle, vote, mma };
constexpr int kExchangeWords = 3;
// All lanes of the mask meet; `all` gets the `words` of each lane, lane by lane. Orders no memory.
void exchange(Collective kind, unsigned mask, const uint64_t* mine, int words, uint64_t* all);

// memory_order.cpp. Identities made here are in the scheduler's name and are dropped when the launch ends.
void fence();
void forget_identities();
enum class Update { add, add_float, exchange, compare_exchange, minimum, maximum, bit_and, bit_or };
uint32_t update(Update kind, uint32_t* address, uint32_t value, uint32_t expected = 0);
void* scheduler_identity();

}  // namespace pe_cpu
