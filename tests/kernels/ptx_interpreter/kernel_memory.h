// Which memory a kernel of a pass was given, from its arguments.
#pragma once

#include "global_memory.h"

namespace ptx {

struct GivenMemory {
  std::vector<Region> regions;
  std::vector<Region> results;  // those of them that the launch has to have written when it ends
};

// `arguments` as the kernel `name` receives them.
GivenMemory memory_of(const std::string& name, const std::vector<unsigned char>& arguments);

// Faults unless all of them was written.
void require_written(const std::string& name, const std::vector<Region>& results);

}  // namespace ptx
