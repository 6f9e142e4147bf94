// Runs calls of C functions on buffers, both read from a file, in a process of its own: a sanitizer's report or a crash
// ends this process and no other. Writes the buffers back. The format is cuda_on_cpu.py's, all in 64-bit words:
//   buffers:  count, then each: bytes, windows, and per window: offset, length, content
//   calls:    count, then each: length of the name, the name, arguments, and per argument: kind, value, offset
#include <sys/mman.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

extern "C" {
const char* pe_cpu_message();
#ifdef PE_TOYS
int toy_sum(const float* x, float* partial, unsigned* counter, float* out, int64_t n);
int toy_transpose(const float* x, float* out, int rows, int columns);
int toy_warp(const float* x, float* out, unsigned* votes);
int toy_histogram(const int* x, int* out, int n);
int toy_pipeline(const float* x, float* out, int chunks);
int toy_mma(int kind, const unsigned* a, const unsigned* b, const float* c, float* d);
int toy_round(int dtype, const float* x, void* out, float* back, int64_t n);
int toy_wide(const float* x, float* out, int64_t row_stride, int rows);
int toy_relay(const float* x, float* out, unsigned* turn, int n);
int toy_leave(const float* x, float* out, int n);
#else
int pe_nf4_dequantize(const void* packed, const void* absmax, const float* nested_absmax, const float* offset,
                      int blocksize, void* out, int dtype, int64_t rows, int64_t columns, int64_t out_stride,
                      int device, void* stream);
int pe_lora_linear_nf4(const void* x, int64_t x_stride, int rows, int64_t k, const void* packed, const void* absmax,
                       const float* nested_absmax, const float* offset, int blocksize, int64_t n, const void* lora_a,
                       const void* lora_b, int rank, int adapter_dtype, float scaling, const void* bias, void* y,
                       int dtype, float* h, void* workspace, int device, void* stream);
int pe_bottleneck_forward(const void* x, const void* residual, int rows, int64_t features, const void* down_weight,
                          const void* down_bias, const void* up_weight, const void* up_bias, int width,
                          const void* norm_weight, const void* norm_bias, float eps, int activation, float scaling,
                          int dtype, int weight_dtype, int norm_dtype, void* y, void* middle, float* stats,
                          void* workspace, int device, void* stream);
int pe_prefix_attention_decode(const void* q, const void* k, const void* v, const void* prefix_k, const void* prefix_v,
                               const int64_t* strides, int batch, int kv_heads, int group, int queries, int keys,
                               int prefix, int head_dim, int shared_prefix, const int* first, const int* last,
                               int causal, float scale, int dtype, int prefix_dtype, void* out, float* lse,
                               void* workspace, int device, void* stream);
#endif
}

namespace {

struct Window {
  int64_t offset, length;
};
struct Buffer {
  char* data;
  std::vector<Window> windows;
};
struct Argument {
  int64_t integer;
  double real;
  void* pointer;

  template <class T>
  T as() const {
    if constexpr (std::is_pointer_v<T>) {
      return static_cast<T>(pointer);
    } else if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(real);
    } else {
      return static_cast<T>(integer);
    }
  }
};

template <class... P>
int call(int (*function)(P...), const std::vector<Argument>& arguments) {
  if (arguments.size() != sizeof...(P)) {
    std::fprintf(stderr, "%zu arguments where %zu are taken\n", arguments.size(), sizeof...(P));
    std::exit(2);
  }
  size_t i = 0;
  const std::tuple<P...> values{arguments[i++].as<P>()...};  // in braces: from left to right
  return std::apply(function, values);
}

int call(const std::string& name, const std::vector<Argument>& arguments) {
#define PE_FUNCTION(function) \
  if (name == #function) return call(function, arguments)
#ifdef PE_TOYS
  PE_FUNCTION(toy_sum);
  PE_FUNCTION(toy_transpose);
  PE_FUNCTION(toy_warp);
  PE_FUNCTION(toy_histogram);
  PE_FUNCTION(toy_pipeline);
  PE_FUNCTION(toy_mma);
  PE_FUNCTION(toy_round);
  PE_FUNCTION(toy_wide);
  PE_FUNCTION(toy_relay);
  PE_FUNCTION(toy_leave);
#else
  PE_FUNCTION(pe_nf4_dequantize);
  PE_FUNCTION(pe_lora_linear_nf4);
  PE_FUNCTION(pe_bottleneck_forward);
  PE_FUNCTION(pe_prefix_attention_decode);
#endif
  std::fprintf(stderr, "no function %s\n", name.c_str());
  std::exit(2);
}

int64_t word(FILE* file) {
  int64_t value;
  if (std::fread(&value, sizeof value, 1, file) != 1) std::exit(2);
  return value;
}

void bytes(FILE* file, void* to, int64_t count) {
  if (count > 0 && std::fread(to, static_cast<size_t>(count), 1, file) != 1) std::exit(2);
}

Buffer read_buffer(FILE* file) {
  const int64_t size = word(file);
  Buffer buffer;
  if (size < int64_t{1} << 28) {
    // Not a byte more than asked for, so that AddressSanitizer sees what is beyond; aligned as cudaMalloc does.
    void* data;
    if (posix_memalign(&data, 256, static_cast<size_t>(size)) != 0) std::exit(2);
    std::memset(data, 0xff, static_cast<size_t>(size));
    buffer.data = static_cast<char*>(data);
  } else {  // huge: memory where it is touched, and none of ours beside it
    const size_t apart = size_t{1} << 34;
    char* data = static_cast<char*>(mmap(nullptr, static_cast<size_t>(size) + 2 * apart, PROT_NONE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (data == MAP_FAILED || mprotect(data + apart, static_cast<size_t>(size), PROT_READ | PROT_WRITE) != 0) {
      std::perror("a huge buffer");
      std::exit(2);
    }
    buffer.data = data + apart;
  }
  for (int64_t i = word(file); i > 0; --i) {
    const int64_t offset = word(file), length = word(file);
    buffer.windows.push_back({offset, length});
    bytes(file, buffer.data + offset, length);
  }
  return buffer;
}

}  // namespace

int main(int, char** paths) {
  FILE* in = std::fopen(paths[1], "rb");
  if (in == nullptr) return 2;
  std::vector<Buffer> buffers;
  for (int64_t i = word(in); i > 0; --i) buffers.push_back(read_buffer(in));
  for (int64_t calls = word(in); calls > 0; --calls) {
    std::string name(static_cast<size_t>(word(in)), ' ');
    bytes(in, name.data(), static_cast<int64_t>(name.size()));
    std::vector<Argument> arguments(static_cast<size_t>(word(in)));
    for (Argument& argument : arguments) {
      const int64_t kind = word(in), value = word(in), offset = word(in);
      argument = {value, std::bit_cast<double>(value), nullptr};
      if (kind == 2) argument.pointer = buffers[static_cast<size_t>(value)].data + offset;
    }
    if (const int code = call(name, arguments)) {
      std::fprintf(stderr, "%s returned %d: %s\n", name.c_str(), code, pe_cpu_message());
      return 3;
    }
  }
  std::fclose(in);
  FILE* out = std::fopen(paths[2], "wb");
  if (out == nullptr) return 2;
  for (const Buffer& buffer : buffers) {
    for (const Window& window : buffer.windows) {
      std::fwrite(buffer.data + window.offset, 1, static_cast<size_t>(window.length), out);
    }
  }
  return std::fclose(out) == 0 ? 0 : 2;
}
