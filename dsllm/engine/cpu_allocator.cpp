// Counts what torch's CPU allocator holds, as the CUDA allocator does by itself: every allocation passes through here on
// its way to the allocator that was there before. Called through ctypes by allocators.py.

#include <atomic>

#include <c10/core/Allocator.h>

namespace {

std::atomic<long long> held{0};
std::atomic<long long> peak{0};
c10::Allocator* inner = nullptr;

struct Block {
  c10::DataPtr data;
  long long bytes;
};

// Tensors may die on other threads than those that made them: gloo's, for one.
void release(void* context) {
  auto* block = static_cast<Block*>(context);
  held -= block->bytes;
  delete block;
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    auto data = inner->allocate(num_bytes);
    void* address = data.get();
    const auto device = data.device();
    auto* block = new Block{std::move(data), static_cast<long long>(num_bytes)};
    const long long now = held += block->bytes;
    long long before = peak;
    while (now > before && !peak.compare_exchange_weak(before, now)) {
    }
    return {address, block, &release, device};
  }

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
