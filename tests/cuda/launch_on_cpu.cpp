// See launch_on_cpu.h. Compiled without sanitizers, so that its own memory is not taken for the kernel's.
#include "launch_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "device_on_cpu.h"
#include "fibres.h"

// All `__shared__` arrays, gathered by shared_on_cpu.ld.
extern "C" char pe_shared_begin[] __attribute__((weak)), pe_shared_end[] __attribute__((weak));

namespace pe_cpu {

Thread* self = nullptr;
LaunchInfo last_launch;

namespace {

#ifdef PE_TSAN
constexpr bool kFresh = true;  // in a launch, stacks and shared memory are used once: an address has one owner
#else
constexpr bool kFresh = false;
#endif

struct Meeting {  // lanes of a warp that wait for each other; used by turns, so a slow lane can still read
  unsigned mask = 0, arrived = 0;
  Collective kind = Collective::sync;
  int turn = 0;
  uint64_t tokens[2] = {};
  uint64_t values[2][32][kExchangeWords];
};

struct Warp {
  unsigned present = 0;
  Meeting meetings[32];  // of disjoint masks; found by the lowest lane
};

void* main_identity = nullptr;
char failure[512] = "";
bool failed = false;
int64_t barren = 0;  // turns since a thread last did anything but look at a counter it waits for
constexpr int64_t kPatience = 10000;
std::vector<Fibre*> idle;
std::mt19937_64 random_order;
bool shuffled = false;

int64_t setting(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == 0 ? otherwise : std::atoll(text);
}

template <class T>
void shuffle(std::vector<T>& items) {
  if (shuffled) std::shuffle(items.begin(), items.end(), random_order);
}

}  // namespace

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;  // a ring: it holds a thread once at most, and allocates nothing in a thread's name
  size_t first = 0, count = 0;
  std::vector<Thread*> waiting;  // at __syncthreads
  int live = 0, phase = 0;
  uint64_t tokens[2] = {};
  void* dynamic = nullptr;
  std::vector<char> statics;  // its static shared memory while another block runs

  ~Block() { std::free(dynamic); }

  void push(Thread* thread) { ready[(first + count++) % ready.size()] = thread; }
  Thread* pop() {
    Thread* thread = ready[first];
    first = (first + 1) % ready.size();
    --count;
    return thread;
  }
};

namespace {

const std::function<void()>* kernel_body = nullptr;
std::vector<std::unique_ptr<Block>> retired;
std::vector<Fibre*> used;
Block* resident_statics = nullptr;

void end_barrier(Block* block) {
  barren = 0;
  ++block->phase;
  shuffle(block->waiting);
  for (Thread* thread : block->waiting) block->push(thread);
  block->waiting.clear();
}

void wait(const char* where) {
  barren = 0;
  self->waits_at = where;
  pause();
}

void leave(Thread* thread) {
  Block* block = thread->block;
  block->warps[static_cast<size_t>(thread->rank / 32)].present &= ~(1u << thread->rank % 32);
  thread->waits_at = nullptr;
  barren = 0;
  --block->live;
  // Who has left is not waited for.
  if (block->live > 0 && static_cast<int>(block->waiting.size()) == block->live) end_barrier(block);
}

void run_thread(void* argument) {
  (*kernel_body)();
  release(&retired);  // the end of the launch waits for everybody
  leave(static_cast<Thread*>(argument));
}

Fibre* take_fibre() {
  if (idle.empty()) return new_fibre();
  Fibre* fibre = idle.back();
  idle.pop_back();
  return fibre;
}

void run(Thread* thread) {
  if (thread->fibre == nullptr) {
    thread->fibre = take_fibre();
    prepare(thread->fibre, run_thread, thread);
    thread->identity = new_identity();
  }
  self = thread;
  become(thread->identity);
  acquire(&resident_statics);  // the scheduler has made new pages, which tells nothing of other threads
  resume(thread->fibre);
  become(main_identity);
  self = nullptr;
  if (thread->fibre->done) {
    (kFresh ? used : idle).push_back(thread->fibre);
    thread->fibre = nullptr;
  }
}

std::unique_ptr<Block> make_block(int64_t index) {
  auto made = std::make_unique<Block>();
  Block* block = made.get();
  const dim3 grid = last_launch.grid, size = last_launch.block;
  const unsigned count = size.x * size.y * size.z;
  block->threads.resize(count);
  block->warps.resize((count + 31) / 32);
  block->live = static_cast<int>(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    thread.thread_index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.block_index = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                          static_cast<unsigned>(index / grid.x / grid.y)};
    thread.block_size = size;
    thread.grid_size = grid;
    thread.rank = static_cast<int>(i);
    thread.block = block;
    block->warps[i / 32].present |= 1u << i % 32;
    block->ready.push_back(&thread);
  }
  block->count = count;
  shuffle(block->ready);
  block->waiting.reserve(count);
  // Exactly as large as asked for, and no number: AddressSanitizer sees an overrun, the answer a read of nothing.
  if (last_launch.shared_bytes > 0) {
    if (posix_memalign(&block->dynamic, 128, last_launch.shared_bytes) != 0) std::abort();
    std::memset(block->dynamic, 0xff, last_launch.shared_bytes);
  }
  block->statics.assign(static_shared_bytes(), static_cast<char>(0xff));
  return made;
}

// Not memcpy: AddressSanitizer would take it for the program's, and the red zones between arrays for a fault.
void copy_pages(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes / 8; ++i) static_cast<uint64_t*>(to)[i] = static_cast<const uint64_t*>(from)[i];
}

// The static shared memory has one place. Its content follows the block that runs.
void bring_statics(Block* block) {
  const size_t bytes = static_shared_bytes();
  if (resident_statics == block || bytes == 0) return;
  if (resident_statics != nullptr) copy_pages(resident_statics->statics.data(), pe_shared_begin, bytes);
  if (kFresh) {
    // New pages for ThreadSanitizer, which else takes the last block's accesses for this one's.
    mmap(pe_shared_begin, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    release(&resident_statics);
  }
  copy_pages(pe_shared_begin, block->statics.data(), bytes);
  resident_statics = block;
}

void report_deadlock(const Block* block) {
  int at_barrier = 0, in_warp = 0;
  for (const Thread& thread : block->threads) {
    if (thread.waits_at == nullptr) continue;
    (std::strcmp(thread.waits_at, "__syncthreads") == 0 ? at_barrier : in_warp) += 1;
  }
  const int left = static_cast<int>(block->threads.size()) - at_barrier - in_warp;
  std::snprintf(failure, sizeof failure,
                "%s: deadlock: %d threads of a block wait at __syncthreads, %d in a warp collective, %d have left",
                last_launch.kernel, at_barrier, in_warp, left);
  failed = true;
}

void report_hang(size_t waiting, size_t others) {
  std::snprintf(failure, sizeof failure,
                "%s: hangs: %zu thread blocks wait for a counter that nobody raises, %zu have found no room to start",
                last_launch.kernel, waiting, others);
  failed = true;
}

// Runs one ready thread of a block until it waits or leaves; false when the block is finished.
bool step(Block* block) {
  if (block->count == 0) {
    if (block->live > 0) report_deadlock(block);
    return false;
  }
  bring_statics(block);
  run(block->pop());
  return true;
}

// One block after the other, or `at_once` by turns. A block that waits for a counter lets the next ones start, as many
// as the device holds.
void run_blocks(const std::vector<int64_t>& order, size_t at_once, size_t held) {
  std::vector<std::unique_ptr<Block>> resident;
  size_t started = 0, which = 0;
  barren = 0;
  while (!failed && (started < order.size() || !resident.empty())) {
    if (started < order.size() && (resident.size() < at_once || (barren > 0 && resident.size() < held))) {
      which = resident.size();
      resident.push_back(make_block(order[started++]));
    } else if (barren > 0) {
      which = (which + 1) % resident.size();
    }
    if (at_once > 1) which = random_order() % resident.size();
    if (barren > kPatience) report_hang(resident.size(), order.size() - started);
    if (step(resident[which].get())) continue;
    if (resident_statics == resident[which].get()) resident_statics = nullptr;
    if (kFresh) retired.push_back(std::move(resident[which]));
    resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(which));
    which = 0;
  }
  resident_statics = nullptr;
  for (const auto& block : resident) {  // after a failure: their threads are given up where they stand
    for (Thread& thread : block->threads) {
      if (thread.fibre == nullptr) continue;
      forget(thread.fibre);
      idle.push_back(thread.fibre);
    }
  }
}

void end_launch() {
  acquire(&retired);
  idle.insert(idle.end(), used.begin(), used.end());
  used.clear();
  for (const auto& block : retired) {
    for (const Thread& thread : block->threads) delete_identity(thread.identity);
  }
  forget_identities();
  retired.clear();
}

std::vector<int64_t> order_of_blocks(const dim3& grid) {
  const int64_t all = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  std::vector<int64_t> order(static_cast<size_t>(std::min(all, setting("PE_CPU_LAST", all))));
  std::iota(order.begin(), order.end(), all - static_cast<int64_t>(order.size()));
  if (setting("PE_CPU_SEED", 0) < 0) std::reverse(order.begin(), order.end());
  else shuffle(order);
  return order;
}

}  // namespace

void launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const std::function<void()>& body) {
  last_launch = {kernel, grid, block, shared_bytes, stream, current_device()};
  failed = false;
  failure[0] = 0;
  if (const char* why = refuse_launch(function, grid, block, shared_bytes)) {
    std::snprintf(failure, sizeof failure, "%s: %s", kernel, why);
    set_error(cudaErrorInvalidConfiguration);
    return;
  }
  const int64_t seed = setting("PE_CPU_SEED", 0);
  shuffled = seed > 0;
  random_order.seed(static_cast<uint64_t>(seed));
  kernel_body = &body;
  main_identity = present_identity();
  const size_t at_once = kFresh ? 1 : static_cast<size_t>(std::max<int64_t>(1, setting("PE_CPU_BLOCKS", 1)));
  // The order in which blocks start is nothing that a kernel can count on.
  const int64_t held = setting("PE_CPU_ROOM", setting("PE_CPU_MULTIPROCESSORS", kMultiprocessors));
  run_blocks(order_of_blocks(grid), at_once, static_cast<size_t>(held));
  if (failed) set_error(cudaErrorLaunchFailure);
  else end_launch();
}

void fail(const char* format, ...) {
  const uint3 t = self->thread_index, b = self->block_index;
  const int used =
      std::snprintf(failure, sizeof failure, "%s: block (%u, %u, %u), thread (%u, %u, %u): ", last_launch.kernel, b.x,
                    b.y, b.z, t.x, t.y, t.z);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(failure + used, sizeof failure - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  failed = true;
  for (;;) pause();
}

void spin() {
  ++barren;
  self->block->push(self);
  pause();
}

const char* message() { return failure; }
void* scheduler_identity() { return main_identity; }
void* dynamic_shared() { return self->block->dynamic; }
size_t static_shared_bytes() { return static_cast<size_t>(pe_shared_end - pe_shared_begin); }
void* barrier_token() { return &self->block->tokens[(self->block->phase & 1) ^ 1]; }

bool in_shared(const void* address) {
  const char* p = static_cast<const char*>(address);
  const char* dynamic = static_cast<const char*>(self->block->dynamic);
  return (p >= pe_shared_begin && p < pe_shared_end) || (p >= dynamic && p < dynamic + last_launch.shared_bytes);
}

void block_barrier() {
  Block* block = self->block;
  // Two tokens by turns: who is through the barrier may reach the next one before a slow thread reads this one.
  uint64_t* token = &block->tokens[block->phase & 1];
  release(token);
  if (static_cast<int>(block->waiting.size()) + 1 == block->live) {
    end_barrier(block);
  } else {
    block->waiting.push_back(self);
    wait("__syncthreads");
  }
  acquire(token);
}

namespace {

// Waits for the other lanes of the mask. `turn` is where the values of all of them lie then.
Meeting& meet(Collective kind, unsigned mask, const uint64_t* mine, int words, int* turn) {
  Thread* me = self;
  Warp& warp = me->block->warps[static_cast<size_t>(me->rank / 32)];
  const int lane = me->rank % 32;
  if (!(mask >> lane & 1)) fail("the mask %08x of a warp collective lacks the caller, lane %d", mask, lane);
  if (mask & ~warp.present) fail("the mask %08x of a warp collective names lanes that have left", mask);
  Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.kind = kind;
  } else if (meeting.mask != mask || meeting.kind != kind) {
    fail("lanes of a warp are in different collectives (masks %08x and %08x)", meeting.mask, mask);
  }
  *turn = meeting.turn & 1;
  for (int i = 0; i < words; ++i) meeting.values[*turn][lane][i] = mine[i];
  if (kind == Collective::sync) release(&meeting.tokens[*turn]);
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) {
    wait("a warp collective");
    return meeting;
  }
  meeting.arrived = 0;
  ++meeting.turn;
  for (int i = 0; i < 32; ++i) {
    if (i != lane && (mask >> i & 1)) me->block->push(me + i - lane);
  }
  return meeting;
}

}  // namespace

void warp_barrier(unsigned mask) {
  int turn;
  Meeting& meeting = meet(Collective::sync, mask, nullptr, 0, &turn);
  acquire(&meeting.tokens[turn]);
}

void exchange(Collective kind, unsigned mask, const uint64_t* mine, int words, uint64_t* all) {
  int turn;
  Meeting& meeting = meet(kind, mask, mine, words, &turn);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < words; ++i) all[lane * words + i] = meeting.values[turn][lane][i];
  }
}

}  // namespace pe_cpu
