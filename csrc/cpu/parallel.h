// Work shared out over the OpenMP threads that PyTorch already runs.
//
// Linking an OpenMP runtime of our own would put a second pool of spinning threads beside torch's (its wheels bring their own libgomp or
// libiomp5). So none is linked: the entry point is looked up in the runtime the process has loaded. Without one, everything runs on the
// calling thread.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

namespace steer::cpu {

// The shards of a region, which its threads draw. Each has a share of its own, neighbours, and takes them in order: its next rows are the
// ones it has prefetched, and what it cached in the last operator is still there. Then it helps the others out: a runtime may grant fewer
// threads than asked for, and a core may be busy with something else.
class Shards {
 public:
  Shards(int count, int threads);

  // A number for a thread, which no other one of the team has: `wanted`, the runtime's own number for it, unless that is taken.
  int claim(int wanted);

  // The next one for `thread`, or -1 where none is left.
  int draw(int thread);

 private:
  struct alignas(64) Share {
    std::atomic<int> next{0};
    std::atomic<bool> claimed{false};
    int end = 0;
  };
  std::vector<Share> shares_;
};

// Calls work(thread, shards) once on each of up to `threads` threads, numbered from 0, which then draw shards until none is left. Results
// must not depend on which thread runs which shard.
void parallel(int shards, int threads, const std::function<void(int, Shards&)>& work);

// The OpenMP runtime found, or a sentence saying that there is none.
const char* parallel_runtime();

}  // namespace steer::cpu
