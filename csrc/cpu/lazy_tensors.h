// The tensors of a step of which only some rows take part: those that the gradient lists, or those where a
// dense one is not all zero. A row is what lies at one index of the first dimension, contiguous in memory.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "../common/coefficient_table.h"
#include "../common/lazy_rows.h"
#include "../common/listed_rows.h"
#include "add_arrays.h"
#include "any_nonzero.h"
#include "kernel.h"
#include "sum_squares.h"
#include "threads.h"
#include "tiles.h"

namespace danlu {

class LazyTensors {
 public:
  // all_moments: the states of the other rows move too, as with a gradient and a parameter of zeros.
  void add(int tensor, Kernel kernel, const std::vector<int64_t>& shape, bool all_moments) {
    const int64_t columns = elements_of_row(shape);
    Member m = {};
    m.index = tensor;
    m.kernel = kernel;
    m.rows = shape[0];
    m.columns = columns;
    m.all_moments = all_moments;
    m.parts = std::max<int64_t>(1, divided_up(columns, item_size));
    m.item_rows = std::max<int64_t>(1, item_size / std::max<int64_t>(1, columns));
    members_.push_back(m);
  }

  // Before the items of a step. listed: in the order of the tensors.
  void start(const std::vector<Tensor>& tensors, const std::vector<ListedRows>& listed,
             const CoefficientTable& coefficients, int threads) {
    items_ = 0;
    auto list = listed.begin();
    for (Member& m : members_) {
      m.first_item = items_;
      m.tensor = tensors[m.index];
      m.list = list != listed.end() && list->tensor == m.index ? &*list++ : nullptr;
      if (m.tensor.coefficients < 0 || m.columns == 0) continue;
      m.coefficients = coefficients[m.tensor.coefficients];
      if (m.all_moments) m.idle.assign(m.coefficients, m.coefficients + coefficients.stride());
      if (m.all_moments) m.idle[store_params] = 0.f;
      items_ += m.items(m.places());
    }
    look_at_long_rows(threads);
  }

  int64_t items() const { return items_; }

  // Of the gradients that list rows: the sum of the squares of what the steps read, in an order that depends
  // on neither the threads nor the entries.
  double squares(const std::vector<Tensor>& tensors, const std::vector<ListedRows>& listed,
                 int threads) const {
    double total = 0;
    for (const ListedRows& list : listed) {
      const auto before = [](const Member& m, int tensor) { return m.index < tensor; };
      const Member& m = *std::lower_bound(members_.begin(), members_.end(), list.tensor, before);
      const Format format = tensors[m.index].g.format;
      std::vector<double> sums(m.columns == 0 ? 0 : m.items(list.count));
      parallel_items(int64_t(sums.size()), threads, [&](int64_t item) {
        sums[item] = squares_of(m, list, format, m.part(item, list.count));
      });
      total = std::accumulate(sums.begin(), sums.end(), total);
    }
    return total;
  }

  void work(int64_t item) const {
    const auto after = [](int64_t value, const Member& m) { return value < m.first_item; };
    const Member& m = *(std::upper_bound(members_.begin(), members_.end(), item, after) - 1);
    const Part part = m.part(item - m.first_item, m.places());
    if (!m.list)
      step_nonzero(m, part);
    else if (m.all_moments)
      step_all(m, part);
    else
      step_listed(m, part);
  }

 private:
  static constexpr int64_t item_size = 65536;
  static constexpr int64_t at_once = 4096;  // elements of a gradient that stay in the first-level cache
  static constexpr int store_params = offsetof(CoefficientsHeader, store_params) / sizeof(float);

  struct Columns {
    int64_t begin, end;  // of each row; all of them, unless a row is longer than a item
  };

  struct Part {           // what a item is
    int64_t first, last;  // rows of the parameter, or of the list
    Columns columns;
  };

  struct Member {
    int index;
    Kernel kernel;
    int64_t rows, columns;
    bool all_moments;
    int64_t parts, item_rows;  // items to a row, rows to a item; one of them is 1

    // of this step
    Tensor tensor;
    const ListedRows* list;  // null: a dense gradient
    const float* coefficients;
    std::vector<float> idle;          // the same for rows whose parameters stay
    std::vector<uint8_t> takes_part;  // where a item does not see whole rows of a dense gradient
    int64_t first_item;

    // What the items cut: rows of the parameter, or of the list if nothing happens to the others.
    int64_t places() const { return list && !all_moments ? list->count : rows; }
    int64_t items(int64_t places) const { return divided_up(places, item_rows) * parts; }

    Part part(int64_t item, int64_t places) const {
      const int64_t first = item / parts * item_rows, begin = item % parts * item_size;
      const int64_t end = parts == 1 ? columns : std::min(columns, begin + item_size);
      return {first, std::min(places, first + item_rows), {begin, end}};
    }
  };

  static void step_listed(const Member& m, const Part& part) {
    for (int64_t place = part.first; place < part.last;)
      place += step_run(m, place, part.last - place, part.columns);
  }

  static void step_all(const Member& m, const Part& part) {
    const ListedRows& list = *m.list;
    int64_t place = std::lower_bound(list.rows, list.rows + list.count, part.first) - list.rows;
    for (int64_t row = part.first; row < part.last;) {
      const int64_t stop = place < list.count ? std::min(list.rows[place], part.last) : part.last;
      rest(m, row, stop - row, part.columns);
      row = stop;
      if (row == part.last) break;
      const int64_t count = step_run(m, place, part.last - row, part.columns);
      place += count;
      row += count;
    }
  }

  // The row at a place of the list, with those after it that lie beside it in the parameter and in the
  // gradient, at most so many; returns how many.
  static int64_t step_run(const Member& m, int64_t place, int64_t most, Columns columns) {
    const ListedRows& list = *m.list;
    const int64_t row = list.rows[place], entry = list.entry(place);
    if (list.entries(place) > 1) {
      gradient_of(list, m.tensor.g.format, place, m.columns, columns, [&](Storage g, int64_t at, int64_t n) {
        Tensor t = m.tensor;
        at += row * m.columns;
        t.g = moved(g, -at);
        m.kernel(t, at, at + n, m.coefficients);
      });
      return 1;
    }
    int64_t count = 1;
    while (count < most && place + count < list.count && list.rows[place + count] == row + count &&
           list.entries(place + count) == 1 && list.entry(place + count) == entry + count)
      count++;
    step(m, row, count, entry, columns);
    return count;
  }

  // Calls see(g, at, n) for blocks of the row at a place of a list: n elements from column `at` on, in g from
  // its first on. An entry is seen where it lies, several are summed.
  template <class See>
  static void gradient_of(const ListedRows& list, Format format, int64_t place, int64_t row_size,
                          Columns columns, const See& see) {
    alignas(64) float buffer[at_once];
    for (int64_t at = columns.begin; at < columns.end; at += at_once) {
      const int64_t n = std::min(at_once, columns.end - at);
      Storage g = {{buffer}, format};
      if (list.entries(place) > 1)
        sum_entries(list, place, row_size, at, n, g);
      else
        g = moved({{list.values}, format}, list.entry(place) * row_size + at);
      see(g, at, n);
    }
  }

  // The sum of n elements from column `at` on of the entries of a row, in the order in which they are listed.
  static void sum_entries(const ListedRows& list, int64_t place, int64_t row_size, int64_t at, int64_t n,
                          Storage sum) {
    const auto entry = [&](int64_t which) {
      return moved({{list.values}, sum.format}, list.entry(place, which) * row_size + at).data[0];
    };
    const int64_t entries = list.entries(place);
    if (entries == 1) std::memcpy(sum.data[0], entry(0), n * info_of(sum.format).arrays[0].bytes);
    for (int64_t which = 1; which < entries; which++)
      add_arrays(which == 1 ? entry(0) : sum.data[0], entry(which), sum, n);
  }

  // Of a item's rows one behind the other, in blocks whose sums are taken as one.
  static double squares_of(const Member& m, const ListedRows& list, Format format, const Part& part) {
    const auto [first, last, columns] = part;
    const int64_t width = columns.end - columns.begin, size = (last - first) * width;
    double total = 0;
    if (!list.permutation) {  // they lie so
      const Storage values = moved({{list.values}, format}, first * m.columns + columns.begin);
      for (int64_t at = 0; at < size; at += at_once)
        total += sum_squares(values, at, std::min(size, at + at_once));
      return total;
    }
    alignas(64) float buffer[at_once];
    const Storage block = {{buffer}, format};
    int64_t filled = 0;
    for (int64_t place = first; place < last; place++)
      for (int64_t at = columns.begin, n; at < columns.end; at += n) {
        n = std::min(at_once - filled, columns.end - at);
        sum_entries(list, place, m.columns, at, n, moved(block, filled));
        filled += n;
        if (filled < at_once) continue;
        total += sum_squares(block, 0, filled);
        filled = 0;
      }
    return total + sum_squares(block, 0, filled);
  }

  // Rows of a dense gradient, each looked at just before the rule reads it.
  static void step_nonzero(const Member& m, const Part& part) {
    const auto [first, last, columns] = part;
    const int64_t most = std::max<int64_t>(1, at_once / m.columns);
    bool now = takes_part(m, first), following = now;
    for (int64_t row = first, next; row < last; row = next, now = following) {
      for (next = row + 1; next < last; next++) {
        following = takes_part(m, next);
        if (following != now || next - row == most) break;
      }
      if (now)
        step(m, row, next - row, row, columns);
      else if (m.all_moments)
        rest(m, row, next - row, columns);
    }
  }

  static bool takes_part(const Member& m, int64_t row) {
    if (m.parts > 1) return m.takes_part[row];
    return any_nonzero(m.tensor.g, row * m.columns, (row + 1) * m.columns);
  }

  // `count` rows from `row` on, whose gradient is in as many rows from `from` on.
  static void step(const Member& m, int64_t row, int64_t count, int64_t from, Columns columns) {
    if (count == 0) return;
    Tensor t = m.tensor;
    t.g = moved(t.g, (from - row) * m.columns);
    m.kernel(t, row * m.columns + columns.begin, (row + count - 1) * m.columns + columns.end, m.coefficients);
  }

  // `count` rows from `row` on that take no part; neither gradient nor parameter is read.
  static void rest(const Member& m, int64_t row, int64_t count, Columns columns) {
    static constexpr int64_t size = 1024;
    alignas(64) static const float zeros[size] = {};
    if (count == 0) return;
    const int64_t end = (row + count - 1) * m.columns + columns.end;
    Tensor t = m.tensor;
    for (int64_t at = row * m.columns + columns.begin; at < end; at += size) {
      for (Storage* read : {&t.p, &t.g}) {
        place_at(*read, const_cast<float*>(zeros));  // nothing is stored there
        *read = moved(*read, -at);
      }
      m.kernel(t, at, std::min(end, at + size), m.idle.data());
    }
  }

  // Where several items share a row of a dense gradient, none of them could tell whether all of it is zero.
  void look_at_long_rows(int threads) {
    for (Member& m : members_) {
      if (m.parts == 1 || m.list || m.tensor.coefficients < 0) continue;
      m.takes_part.assign(m.rows, 0);
      parallel_items(m.rows * m.parts, threads, [&m](int64_t item) {
        uint8_t* found = &m.takes_part[item / m.parts];
        const int64_t begin = item / m.parts * m.columns + item % m.parts * item_size;
        const int64_t end = std::min((item / m.parts + 1) * m.columns, begin + item_size);
        if (__atomic_load_n(found, __ATOMIC_RELAXED) || !any_nonzero(m.tensor.g, begin, end)) return;
        __atomic_store_n(found, 1, __ATOMIC_RELAXED);
      });
    }
  }

  std::vector<Member> members_;
  int64_t items_ = 0;
};

}  // namespace danlu
