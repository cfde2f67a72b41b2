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

struct Runtime {
  ParallelFunction parallel = nullptr;
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
    if (candidate.parallel != nullptr) candidate.name = "the process's OpenMP runtime";
#endif
    if (candidate.parallel == nullptr) candidate.name = Runtime().name;
    return candidate;
  }();
  return found;
}

struct Team {
  Team(const std::function<void(int)>& work, int shards) : work(work), shards(shards) {}

  const std::function<void(int)>& work;
  const int shards;
  std::atomic<int> next{0};
  std::exception_ptr failure;
  std::mutex guard;
};

// A runtime may grant fewer threads than asked for, so threads draw shards instead of owning them.
void draw_shards(void* data) {
  auto* team = static_cast<Team*>(data);
  for (int shard; (shard = team->next.fetch_add(1)) < team->shards;) {
    try {
      team->work(shard);
    } catch (...) {
      std::lock_guard<std::mutex> lock(team->guard);
      if (!team->failure) team->failure = std::current_exception();
    }
  }
}

}  // namespace

void parallel(int shards, int threads, const std::function<void(int)>& work) {
  Team team(work, shards);
  threads = std::min(shards, threads);
  if (threads > 1 && runtime().parallel != nullptr)
    runtime().parallel(draw_shards, &team, static_cast<unsigned>(threads), 0);
  else
    draw_shards(&team);
  if (team.failure) std::rethrow_exception(team.failure);
}

const char* parallel_runtime() { return runtime().name.c_str(); }

}  // namespace steer::cpu
