// What one launch sees of its tensors, by value: the most that a kernel's parameters hold, or a tenth of it,
// since a launch copies all of them. A packed list of tensors grows from the front, coefficients grow
// from the back. There is no map from blocks to tensors: a block finds its tensor by binary search, so that
// the size of tensors does not count, only their number.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "../common/tensor_list.h"
#include "runtime.h"

namespace danlu {

// A tensor's record has as many words as it has arrays, in the order of for_arrays(); where a format asks for
// places, one for that of its first element; and one for
// {first chunk: 32 bits, set of coefficients: 16, size of its last chunk - 1: 16}.
__host__ __device__ constexpr int words_of_record(int num_arrays, bool indexed) {
  return num_arrays + indexed + 1;
}

template <class F>
constexpr int record_words = words_of_record(F::num_values + F::num_further, F::indexed);

// CUDA 12.1 and newer allow 32,764 bytes. On sm_90 parameters begin at c[0x0][0x210], and ptxas leaves
// reads that cross 0x8000 only by these 0x210 bytes without the correction that its signed offsets need:
// the last of them have to end below.
constexpr int long_list = 31 * 1024, short_list = 4 * 1024;

struct LaunchHead {
  const float* device_coefficients;  // coefficients computed on the device, or null: they stand in the list
  const float* found_inf;            // or null; where it is not 0 the launch does nothing
  const float* clip;                 // or null; multiplies every gradient
  int32_t num_tensors;
  int32_t stride;  // floats from one coefficients to the next
};

template <int bytes>
struct LaunchList : LaunchHead {
  static constexpr int num_words = (bytes - int(sizeof(LaunchHead))) / 8;
  uint64_t words[num_words];

  template <int record_words>
  __host__ __device__ uint64_t word(int tensor, int which) const {
    return words[tensor * record_words + which];
  }

  template <int record_words>
  __host__ __device__ uint64_t packed(int tensor) const {
    return word<record_words>(tensor, record_words - 1);
  }

  template <int record_words>
  __host__ __device__ uint32_t first_chunk(int tensor) const {
    return uint32_t(packed<record_words>(tensor) >> 32);
  }

  __host__ __device__ static int set(uint64_t packed) { return int((packed >> 16) & 0xffff); }
  __host__ __device__ static int last_size(uint64_t packed) { return int(packed & 0xffff) + 1; }

  // Set 0 ends where the list ends.
  __host__ __device__ const float* host_coefficients(int set) const {
    return reinterpret_cast<const float*>(words + num_words) - int64_t(set + 1) * stride;
  }
};

static_assert(sizeof(LaunchList<long_list>) <= long_list && sizeof(LaunchList<short_list>) <= short_list);

// The part of a tensor that one block has.
struct Chunk {
  int tensor, set;
  int64_t offset;  // of its first element
  int size;
};

template <int record_words, class List>
__host__ __device__ inline Chunk find_chunk(const List& list, uint32_t block, uint32_t blocks,
                                            int chunk_size) {
  int tensor = 0;
  for (int end = list.num_tensors; end - tensor > 1;) {
    const int middle = (tensor + end) / 2;
    if (list.template first_chunk<record_words>(middle) <= block)
      tensor = middle;
    else
      end = middle;
  }
  const uint64_t packed = list.template packed<record_words>(tensor);
  const uint32_t next =
      tensor + 1 < list.num_tensors ? list.template first_chunk<record_words>(tensor + 1) : blocks;
  const int64_t offset = int64_t(block - uint32_t(packed >> 32)) * chunk_size;
  const int size = block + 1 < next ? chunk_size : List::last_size(packed);
  return {tensor, List::set(packed), offset, size};
}

// Fills one launch's list after the other.
class LaunchPacker {
 public:
  static constexpr int64_t max_blocks = (int64_t{1} << 31) - 1;

  // num_floats: floats of a coefficients; device_coefficients: where they are if the device computed them,
  // with num_floats as stride
  LaunchPacker(int num_states, int num_floats, int chunk_size, const float* device_coefficients)
      : num_states_(num_states),
        num_floats_(num_floats),
        chunk_size_(chunk_size),
        device_coefficients_(device_coefficients) {
    clear();
  }

  // False if the tensor, which has at least one element, does not fit into this launch any more. All tensors
  // have the same formats.
  // coefficients: its row, unless the device has it.
  bool add(const Tensor& t, const float* coefficients) {
    const int64_t chunks = (t.size + chunk_size_ - 1) / chunk_size_;
    if (num_blocks_ > 0 && num_blocks_ + chunks > max_blocks) return false;
    if (list_.num_tensors == 0) first_set_ = t.coefficients;
    const bool new_set = !device_coefficients_ && place_of(t.coefficients) < 0;
    const int64_t set = device_coefficients_ ? t.coefficients - first_set_
                        : new_set            ? num_sets_
                                             : place_of(t.coefficients);
    if (set < 0 || set > 0xffff) return false;
    const bool indexed = any_indexed(t, num_states_);
    const int words = words_of_record(2 + num_states_ + num_further(t, num_states_), indexed);
    words_ = words;
    const int64_t more = int64_t(list_.num_tensors + 1) * words + words_of_sets(num_sets_ + new_set);
    if (more > list_.num_words) return false;

    uint64_t* w = list_.words + list_.num_tensors * words;
    for_arrays(t, num_states_, 2 + num_states_,
               [&](int word, const void* address) { w[word] = reinterpret_cast<uint64_t>(address); });
    if (indexed) w[words - 2] = uint64_t(t.first);
    w[words - 1] =
        uint64_t(num_blocks_) << 32 | uint64_t(set) << 16 | uint64_t(t.size - (chunks - 1) * chunk_size_ - 1);
    list_.num_tensors++;
    num_blocks_ += chunks;
    if (new_set) {
      place_of(t.coefficients) = num_sets_++;
      float* to = const_cast<float*>(list_.host_coefficients(int(set)));
      for (int i = 0; i < num_floats_; i++) to[i] = coefficients[i];
    }
    return true;
  }

  void clear() {
    list_.num_tensors = 0;
    list_.stride = num_floats_;
    num_blocks_ = 0;
    num_sets_ = 0;
    places_.clear();
  }

  LaunchHead& head() { return list_; }
  bool empty() const { return list_.num_tensors == 0; }
  int num_tensors() const { return list_.num_tensors; }
  int64_t num_blocks() const { return num_blocks_; }

  // Calls launch(list, blocks) with the short list if everything fits into it, with the long one else.
  template <class Launch>
  cudaError_t launch(const Launch& launch) {
    list_.device_coefficients =
        device_coefficients_ ? device_coefficients_ + int64_t(first_set_) * num_floats_ : nullptr;
    const int64_t tensors = int64_t(list_.num_tensors) * words_;
    const int64_t sets = words_of_sets(num_sets_);
    if (tensors + sets > LaunchList<short_list>::num_words) return launch(list_, unsigned(num_blocks_));
    LaunchList<short_list> list;
    static_cast<LaunchHead&>(list) = list_;
    std::copy_n(list_.words, tensors, list.words);
    std::copy_n(std::end(list_.words) - sets, sets, std::end(list.words) - sets);
    return launch(list, unsigned(num_blocks_));
  }

 private:
  int64_t words_of_sets(int sets) const {
    return device_coefficients_ ? 0 : (int64_t(sets) * num_floats_ + 1) / 2;
  }

  // Where this launch has a coefficients; -1: nowhere yet.
  int& place_of(int set) {
    if (set >= int(places_.size())) places_.resize(set + 1, -1);
    return places_[set];
  }

  const int num_states_, num_floats_, chunk_size_;
  const float* const device_coefficients_;
  LaunchList<long_list> list_;
  int64_t num_blocks_;
  int words_ = 0;  // of a record
  int num_sets_, first_set_ = 0;
  std::vector<int> places_;
};

}  // namespace danlu
