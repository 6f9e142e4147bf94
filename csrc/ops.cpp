// Ops that belong to no kernel file. Each csrc/cpu/<op>.cpp registers its own; schemas are declared in Python.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

namespace {

// level >= 0 pins the instruction set; -1 asks for the one in use, -2 for the best.
int64_t cpu_isa(int64_t level) {
  if (level >= 0) pe::set_isa(static_cast<pe::Isa>(level));
  return static_cast<int64_t>(level == -2 ? pe::best_isa() : pe::current_isa());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
