// Memory that loops work in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace steer::cpu::STEER_NAMESPACE {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Room for `count` numbers, aligned to a cache line, uninitialised.
template <typename C>
class Buffer {
 public:
  explicit Buffer(std::int64_t count = 0) { reserve(count); }
  C* reserve(std::int64_t count) {
    if (count <= count_) return data();
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(C) + 63) / 64 * 64;
    memory_.reset(std::aligned_alloc(64, bytes));
    if (memory_ == nullptr) throw std::bad_alloc();
    count_ = count;
    return data();
  }
  C* data() { return static_cast<C*>(memory_.get()); }
  const C* data() const { return static_cast<const C*>(memory_.get()); }

 private:
  std::unique_ptr<void, Free> memory_;
  std::int64_t count_ = 0;
};

}  // namespace steer::cpu::STEER_NAMESPACE
