#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>

#if defined(__linux__)
#include <link.h>
#endif

namespace steer::cpu {

namespace {

// GCC's and LLVM's runtimes both offer this entry point: run `body(data)` on a team of `threads`, the caller among them.
using ParallelFunction = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
using ThreadNumber = int (*)();

struct Runtime {
  ParallelFunction parallel = nullptr;
  ThreadNumber thread_number = nullptr;
  std::string name = "none found: runs on the calling thread";
};

#if defined(__linux__)
int visit(dl_phdr_info* info, std::size_t, void* data) {
  const char* path = info->dlpi_name;
  if (path == nullptr) return 0;
  const char* slash = std::strrchr(path, '/');
  const char* file = slash == nullptr ? path : slash + 1;
  for (const char* prefix : {"libgomp", "libiomp5", "libomp"}) {
    if (std::strncmp(file, prefix, std::strlen(prefix)) != 0) continue;
    void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) continue;
    auto* runtime = static_cast<Runtime*>(data);
    runtime->parallel = reinterpret_cast<ParallelFunction>(dlsym(library, "GOMP_parallel"));
    runtime->thread_number = reinterpret_cast<ThreadNumber>(dlsym(library, "omp_get_thread_num"));
    runtime->name = file;
    if (runtime->parallel != nullptr) return 1;
  }
  return 0;
}
#endif

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime candidate;
#if defined(__linux__)
    dl_iterate_phdr(visit, &candidate);
#else
    candidate.parallel = reinterpret_cast<ParallelFunction>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    candidate.thread_number = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    if (candidate.parallel != nullptr) candidate.name = "the process's OpenMP runtime";
#endif
    if (candidate.parallel == nullptr) candidate.name = Runtime().name;
    return candidate;
  }();
  return found;
}

struct Team {
  const std::function<void(int, Shards&)>& work;
  Shards shards;
  std::exception_ptr failure;
  std::mutex guard;
};

void run_thread(void* data) {
  auto* team = static_cast<Team*>(data);
  try {
    const auto number = runtime().thread_number;
    team->work(team->shards.claim(number == nullptr ? 0 : number()), team->shards);
  } catch (...) {
    std::lock_guard<std::mutex> lock(team->guard);
    if (!team->failure) team->failure = std::current_exception();
  }
}

}  // namespace

Shards::Shards(int count, int threads) : shares_(threads) {
  for (int t = 0; t < threads; ++t) {
    shares_[t].next = static_cast<int>(static_cast<std::int64_t>(count) * t / threads);
    shares_[t].end = static_cast<int>(static_cast<std::int64_t>(count) * (t + 1) / threads);
  }
}

int Shards::claim(int wanted) {
  const int threads = static_cast<int>(shares_.size());
  for (int t = std::max(0, wanted);; ++t)
    if (!shares_[t % threads].claimed.exchange(true)) return t % threads;
}

int Shards::draw(int thread) {
  const int threads = static_cast<int>(shares_.size());
  for (int t = 0; t < threads; ++t) {
    Share& share = shares_[(thread + t) % threads];
    // Looked at first: a counter that is counted up forever would come round.
    if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
    const int shard = share.next.fetch_add(1, std::memory_order_relaxed);
    if (shard < share.end) return shard;
  }
  return -1;
}

void parallel(int shards, int threads, const std::function<void(int, Shards&)>& work) {
  threads = std::max(1, std::min(shards, threads));
  Team team{work, {shards, threads}, nullptr, {}};
  if (threads > 1 && runtime().parallel != nullptr)
    runtime().parallel(run_thread, &team, static_cast<unsigned>(threads), 0);
  else
    run_thread(&team);
  if (team.failure) std::rethrow_exception(team.failure);
}

const char* parallel_runtime() { return runtime().name.c_str(); }

}  // namespace steer::cpu
