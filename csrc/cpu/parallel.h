// Work shared out over the OpenMP threads that PyTorch already runs.
//
// Linking an OpenMP runtime of our own would put a second pool of spinning threads beside torch's (its wheels bring their own libgomp or
// libiomp5). So none is linked: the entry point is looked up in the runtime the process has loaded. Without one, everything runs on the
// calling thread.
#pragma once

#include <functional>

namespace steer::cpu {

// Calls work(0) .. work(shards - 1), each once, on up to `threads` threads. Results must not depend on which thread runs which shard.
void parallel(int shards, int threads, const std::function<void(int)>& work);

// The OpenMP runtime found, or a sentence saying that there is none.
const char* parallel_runtime();

}  // namespace steer::cpu
