// Buffers that a thread keeps between calls, so that no kernel touches fresh pages.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace pe {

enum class Slot { panel, accumulators, activations, dropped, adapter, transposed, few_rows, task, shared, sums, count };

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // At least `bytes`, aligned to 64; what it held before may be gone.
  void* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_);
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// A slot is a buffer of its own for each T: bottleneck's backward has floats and words of Slot::panel alive at once.
template <class T>
T* scratch(Slot slot, int64_t count) {
  thread_local Scratch slots[static_cast<int>(Slot::count)];
  return static_cast<T*>(slots[static_cast<int>(slot)].get(static_cast<size_t>(count) * sizeof(T) + 64));
}

}  // namespace pe
