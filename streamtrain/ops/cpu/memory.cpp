// A caching allocator: the memory of freed large tensors is reused for tensors of about the same size.
//
// A step frees and allocates some gigabytes of them. The first touch of memory from the system costs as much as several
// passes over it, and the C library's own cache fragments more from step to step.
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>

namespace streamtrain {
namespace {

// smaller tensors use the previous allocator
constexpr size_t MIN_BYTES = 1 << 20;
// number of large allocations (several steps) after which unused memory is returned to the system
constexpr int64_t MAX_AGE = 4096;

class CachingAllocator final : public c10::Allocator {
 public:
  static CachingAllocator& instance() {
    // never destroyed, because tensors may outlive static objects
    static CachingAllocator* only = new CachingAllocator;
    return *only;
  }

  void limit(size_t bytes) {
    const std::lock_guard lock(mutex_);
    limit_ = bytes;
    while (cached_ > limit_) release_to_system(free_.begin());
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < MIN_BYTES) return previous_->allocate(bytes);
    const size_t size = (bytes + PAGE - 1) / PAGE * PAGE;
    const std::lock_guard lock(mutex_);
    num_allocations_++;
    void* memory = nullptr;
    // use at most twice the size needed
    const auto found = free_.lower_bound(size);
    if (found != free_.end() && found->first <= 2 * size) {
      memory = found->second.memory;
      sizes_[memory] = found->first;
      remove(found);
    } else {
      int failed = posix_memalign(&memory, PAGE, size);
      if (failed) {
        while (!free_.empty()) release_to_system(free_.begin());
        failed = posix_memalign(&memory, PAGE, size);
      }
      TORCH_CHECK(!failed, "not enough memory for a tensor of ", bytes, " bytes");
      sizes_[memory] = size;
    }
    return {memory, memory, &CachingAllocator::release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &CachingAllocator::release; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

 private:
  struct Freed {
    void* memory;
    int64_t freed_at;
  };
  using Entry = std::multimap<size_t, Freed>::iterator;
  static constexpr size_t PAGE = 4096;

  CachingAllocator() : previous_(c10::GetCPUAllocator()) {
    // a forked child must not inherit a lock held by another thread
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
  }

  static void release(void* memory) { instance().cache(memory); }

  void cache(void* memory) {
    std::unique_lock lock(mutex_);
    const auto found = sizes_.find(memory);
    if (found == sizes_.end()) {
      lock.unlock();
      previous_->raw_deleter()(memory);
      return;
    }
    const size_t bytes = found->second;
    sizes_.erase(found);
    for (Entry each = free_.begin(); each != free_.end();) {
      const Entry next = std::next(each);
      if (num_allocations_ - each->second.freed_at > MAX_AGE) release_to_system(each);
      each = next;
    }
    if (cached_ + bytes > limit_) {
      std::free(memory);
      return;
    }
    free_.emplace(bytes, Freed{memory, num_allocations_});
    cached_ += bytes;
  }

  void remove(Entry place) {
    cached_ -= place->first;
    free_.erase(place);
  }

  void release_to_system(Entry place) {
    std::free(place->second.memory);
    remove(place);
  }

  c10::Allocator* previous_;
  std::mutex mutex_;
  // of live tensors
  std::unordered_map<void*, size_t> sizes_;
  std::multimap<size_t, Freed> free_;
  size_t cached_ = 0, limit_ = 0;
  int64_t num_allocations_ = 0;
};

// Caches up to ``bytes`` of freed tensors from now on; 0: none.
void keep_memory(int64_t bytes) {
  TORCH_CHECK(bytes >= 0, "memory to keep must not be negative");
  CachingAllocator& allocator = CachingAllocator::instance();
  allocator.limit(bytes);
  if (c10::GetCPUAllocator() != &allocator) c10::SetCPUAllocator(&allocator, 1);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(streamtrain, library) { library.def("keep_memory", keep_memory); }

}  // namespace streamtrain
