// The memory of large tensors stays with the process when they are freed, for the next tensors of about their size.
//
// A step frees and makes again some gigabytes of them. Memory that comes from the system anew costs as much, before it is
// first written to, as several passes over it; what the C library keeps comes in pieces that fit worse from step to step.
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

// smaller tensors are left to the allocator that was there before
constexpr size_t LEAST = 1 << 20;
// large tensors made since a block was last in use, after which it goes back to the system: several steps' worth
constexpr int64_t FORGOTTEN = 4096;

class Keeping final : public c10::Allocator {
 public:
  static Keeping& instance() {
    // never destroyed: tensors outlive what is static
    static Keeping* only = new Keeping;
    return *only;
  }

  void limit(size_t bytes) {
    const std::lock_guard lock(mutex_);
    most_ = bytes;
    while (kept_ > most_) give_back(free_.begin());
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < LEAST) return before_->allocate(bytes);
    const size_t wanted = (bytes + PAGE - 1) / PAGE * PAGE;
    const std::lock_guard lock(mutex_);
    made_++;
    void* memory = nullptr;
    // no tensor takes more than twice what it needs
    const auto found = free_.lower_bound(wanted);
    if (found != free_.end() && found->first <= 2 * wanted) {
      memory = found->second.memory;
      sizes_[memory] = found->first;
      drop(found);
    } else {
      int failed = posix_memalign(&memory, PAGE, wanted);
      if (failed) {
        while (!free_.empty()) give_back(free_.begin());
        failed = posix_memalign(&memory, PAGE, wanted);
      }
      TORCH_CHECK(!failed, "not enough memory for a tensor of ", bytes, " bytes");
      sizes_[memory] = wanted;
    }
    return {memory, memory, &Keeping::release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Keeping::release; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

 private:
  struct Freed {
    void* memory;
    int64_t since;
  };
  using Place = std::multimap<size_t, Freed>::iterator;
  static constexpr size_t PAGE = 4096;

  Keeping() : before_(c10::GetCPUAllocator()) {
    // a child must not begin with a lock that another thread of its parent held
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
  }

  static void release(void* memory) { instance().take(memory); }

  void take(void* memory) {
    std::unique_lock lock(mutex_);
    const auto found = sizes_.find(memory);
    if (found == sizes_.end()) {
      lock.unlock();
      before_->raw_deleter()(memory);
      return;
    }
    const size_t bytes = found->second;
    sizes_.erase(found);
    for (Place each = free_.begin(); each != free_.end();) {
      const Place next = std::next(each);
      if (made_ - each->second.since > FORGOTTEN) give_back(each);
      each = next;
    }
    if (kept_ + bytes > most_) {
      std::free(memory);
      return;
    }
    free_.emplace(bytes, Freed{memory, made_});
    kept_ += bytes;
  }

  void drop(Place place) {
    kept_ -= place->first;
    free_.erase(place);
  }

  void give_back(Place place) {
    std::free(place->second.memory);
    drop(place);
  }

  c10::Allocator* before_;
  std::mutex mutex_;
  // of tensors that are there
  std::unordered_map<void*, size_t> sizes_;
  std::multimap<size_t, Freed> free_;
  size_t kept_ = 0, most_ = 0;
  int64_t made_ = 0;
};

// From now on, up to so many bytes of freed tensors; 0: none.
void keep_memory(int64_t bytes) {
  TORCH_CHECK(bytes >= 0, "memory to keep must not be negative");
  Keeping& keeping = Keeping::instance();
  keeping.limit(bytes);
  if (c10::GetCPUAllocator() != &keeping) c10::SetCPUAllocator(&keeping, 1);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(streamtrain, library) { library.def("keep_memory", keep_memory); }

}  // namespace streamtrain
