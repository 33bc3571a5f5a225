// Counts what torch's CPU allocator holds, as the CUDA allocator does by itself: every allocation passes through here on
// its way to the allocator that was there before. Called through ctypes by allocators.py.

#include <atomic>

#include <c10/core/Allocator.h>

namespace {

std::atomic<long long> held{0};
std::atomic<long long> peak{0};
c10::Allocator* inner = nullptr;

// In front of every block: its size, in as many bytes as keep the alignment of torch's own allocator (c10/core/
// alignment.h). Not in a context of its own: oneDNN's matrix products in bf16 take raw pointers, for which c10 asserts
// that address and context are one.
constexpr size_t header_bytes = 64;

// Tensors may die on other threads than those that made them: gloo's, for one. oneDNN's exact GELU gives back blocks of
// no size.
void release(void* address) {
  if (address == nullptr) {
    return;
  }
  auto* block = static_cast<char*>(address) - header_bytes;
  held -= *reinterpret_cast<long long*>(block);
  inner->raw_deallocate(block);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (num_bytes == 0) {
      return {nullptr, nullptr, &release, device};
    }
    auto* block = static_cast<char*>(inner->raw_allocate(num_bytes + header_bytes));
    *reinterpret_cast<long long*>(block) = num_bytes;
    const long long now = held += num_bytes;
    long long before = peak;
    while (now > before && !peak.compare_exchange_weak(before, now)) {
    }
    void* address = block + header_bytes;
    return {address, address, &release, device};
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
