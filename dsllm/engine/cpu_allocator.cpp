// Counts what torch's CPU allocator holds, as the CUDA allocator does by itself: every allocation passes through here on
// its way to the allocator that was there before. Called through ctypes by allocators.py.

#include <atomic>

#include <c10/core/Allocator.h>

namespace {

std::atomic<long long> held{0};
std::atomic<long long> peak{0};
c10::Allocator* inner = nullptr;

// Before each allocation lies its size, so that it can be freed by its address alone: oneDNN's bf16 kernels take and
// return scratch memory that way (Allocator::raw_allocate). As long as torch's own alignment, which it keeps.
constexpr size_t kHeader = 64;

// Tensors may die on other threads than those that made them: gloo's, for one.
void release(void* address) {
  if (address == nullptr) {
    return;
  }
  auto* block = static_cast<char*>(address) - kHeader;
  held -= *reinterpret_cast<long long*>(block);
  inner->raw_deallocate(block);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    auto* block = static_cast<char*>(inner->raw_allocate(num_bytes + kHeader));
    *reinterpret_cast<long long*>(block) = static_cast<long long>(num_bytes);
    const long long now = held += static_cast<long long>(num_bytes);
    long long before = peak;
    while (now > before && !peak.compare_exchange_weak(before, now)) {
    }
    auto* address = block + kHeader;
    return {address, address, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* destination, const void* source, size_t num_bytes) const override {
    default_copy_data(destination, source, num_bytes);
  }
};

CountingAllocator counting;

}  // namespace

extern "C" {

void install() {
  if (inner == nullptr) {
    inner = c10::GetAllocator(c10::DeviceType::CPU);
    c10::SetAllocator(c10::DeviceType::CPU, &counting, /*priority=*/255);
  }
}

long long held_bytes() { return held; }
long long peak_bytes() { return peak; }
void reset_peak() { peak = held.load(); }

}  // extern "C"
