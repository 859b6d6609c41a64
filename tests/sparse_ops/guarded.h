// Arrays that begin where readable memory begins, or end where it ends.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace sparse_ops {

// Which end of the array lies at an inaccessible page. A page is inaccessible on the other side, too, but
// there the rest of a page of bytes may lie between.
enum class Edge { front, back };

template <class T>
class Guarded {
 public:
  // `gap` bytes lie between the array and its edge: floats at odd addresses.
  explicit Guarded(size_t count, size_t gap = 0, Edge edge = Edge::back) {
    page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = count * sizeof(T) + gap;
    inside_ = (bytes + page_ - 1) / page_ * page_;
    void* memory = mmap(nullptr, inside_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    memory_ = static_cast<char*>(memory);
    protect(PROT_READ | PROT_WRITE);
    data_ = memory_ + page_ + (edge == Edge::front ? gap : inside_ - bytes);
  }
  explicit Guarded(const std::vector<T>& values, size_t gap = 0, Edge edge = Edge::back)
      : Guarded(values.size(), gap, edge) {
    if (!values.empty()) std::memcpy(data_, values.data(), values.size() * sizeof(T));
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, inside_ + 2 * page_); }

  // From now on a write faults, as in a model file that is mapped into memory.
  void make_read_only() const { protect(PROT_READ); }

  void* data() const { return data_; }
  T* typed() const { return static_cast<T*>(data()); }

 private:
  static void fail(const char* what) {
    std::perror(what);
    std::exit(2);
  }
  void protect(int access) const {
    if (inside_ > 0 && mprotect(memory_ + page_, inside_, access) != 0) fail("mprotect");
  }

  size_t page_, inside_;
  char* memory_;
  char* data_;
};

}  // namespace sparse_ops
