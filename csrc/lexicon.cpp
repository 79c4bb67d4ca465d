// The units of a hybrid language model, and the lookup of the units that start at each position of a text.
//
// Every prefix of a frequent n-gram is frequent too, so the units are the nodes of a trie. Unit 0 is the unknown
// character. It is followed by the characters in the order of their code points, then by the n-grams in the order of
// their length and, within a length, of their code points. The edges are stored in one table. The row of children of
// each node is shifted so that all of its children fall on free slots. A step down the trie is then a single lookup.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <future>
#include <numeric>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

constexpr uint32_t kNewline = '\n';
constexpr int64_t kCodes = 0x110000;  // number of Unicode code points
constexpr int64_t kGrain = 1 << 15;   // least number of characters per thread

struct Text {
  const void* data;
  int width;  // bytes per character: 1, 2 or 4
  int64_t size;
};

// calls f(characters) with a pointer of the type of the text's characters
template <class F>
void with_characters(const Text& text, const F& f) {
  if (text.width == 1) return f(static_cast<const uint8_t*>(text.data));
  if (text.width == 2) return f(static_cast<const uint16_t*>(text.data));
  f(static_cast<const uint32_t*>(text.data));
}

// str or bytes objects; holds references, so that no other thread frees the objects while they are read
struct Texts {
  py::tuple held;
  bool unicode = false;
  std::vector<Text> text;

  explicit Texts(const py::list& texts) : held(texts) {
    for (const py::handle one : held) {
      const bool is_unicode = PyUnicode_Check(one.ptr());
      if (!is_unicode && !PyBytes_Check(one.ptr()))
        throw py::type_error(std::string("texts: expected str or bytes each, got ") + Py_TYPE(one.ptr())->tp_name);
      if (text.empty()) unicode = is_unicode;
      if (is_unicode != unicode) throw py::type_error("texts: expected all str or all bytes, got both");
      if (!is_unicode) {
        text.push_back({PyBytes_AS_STRING(one.ptr()), 1, PyBytes_GET_SIZE(one.ptr())});
        continue;
      }
#if PY_VERSION_HEX < 0x030C0000
      if (PyUnicode_READY(one.ptr())) throw py::error_already_set();
#endif
      text.push_back({PyUnicode_DATA(one.ptr()), static_cast<int>(PyUnicode_KIND(one.ptr())),
                      PyUnicode_GET_LENGTH(one.ptr())});
    }
  }
};

// calls f(part, lo, hi) for `parts` equal parts of [0, n), each in a thread of its own
template <class F>
void parallel_parts(int64_t n, int64_t parts, const F& f) {
  std::vector<std::future<void>> others;
  for (int64_t p = 1; p < parts; ++p)
    others.push_back(std::async(std::launch::async, [=, &f] { f(p, n * p / parts, n * (p + 1) / parts); }));
  f(0, 0, n / parts);
  for (auto& other : others) other.get();
}

int64_t parts_of(int64_t n, int64_t threads) {
  return std::clamp<int64_t>(n / kGrain, 1, std::max<int64_t>(threads, 1));
}

// A hash table that counts keys. `entry` is the index of a key in the order of first occurrence.
class Counter {
 public:
  struct Slot {
    uint64_t key;
    uint32_t count;  // 0 for a free slot
    int32_t entry;
  };

  Counter() : slots_(1 << 12) {}
  int32_t size() const { return size_; }

  int32_t add(uint64_t key, uint32_t times) {
    size_t i = find_slot(key);
    if (slots_[i].count == 0) {
      if (2 * static_cast<size_t>(size_) >= slots_.size()) {
        grow();
        i = find_slot(key);
      }
      slots_[i] = {key, 0, size_++};
    }
    slots_[i].count += times;
    return slots_[i].entry;
  }

  template <class F>
  void each(const F& f) const {
    for (const Slot& s : slots_)
      if (s.count) f(s);
  }

 private:
  size_t find_slot(uint64_t key) const {
    const size_t mask = slots_.size() - 1;
    size_t i = (key * 0x9E3779B97F4A7C15ull) >> 20 & mask;
    while (slots_[i].count && slots_[i].key != key) i = (i + 1) & mask;
    return i;
  }
  void grow() {
    std::vector<Slot> old(4 * slots_.size());
    old.swap(slots_);
    for (const Slot& s : old)
      if (s.count) slots_[find_slot(s.key)] = s;
  }
  std::vector<Slot> slots_;
  int32_t size_ = 0;
};

class Trie {
 public:
  using Codes = py::array_t<uint32_t, py::array::c_style>;
  using Ids = py::array_t<int32_t, py::array::c_style>;

  // the units of texts: every character, and every n-gram of 2 to max_length characters that occurs within lines at
  // least min_count times
  static Trie count(const py::list& list, int64_t max_length, int64_t min_count, int64_t threads) {
    const Texts texts(list);
    Trie trie(texts.unicode, max_length);
    py::gil_scoped_release release;
    trie.count_characters(texts.text);
    trie.count_ngrams(texts.text, min_count, threads);
    trie.place_edges();
    return trie;
  }

  // a trie from its `codes`, `parents` and `symbols`; raises ValueError if they contradict each other
  static Trie of(bool unicode, int64_t max_length, const Codes& codes, const Ids& parents, const Ids& symbols) {
    Trie trie(unicode, max_length);
    const int64_t characters = codes.size();
    trie.check(max_length >= 1 && parents.size() == symbols.size());
    for (int64_t i = 0; i < characters; ++i)
      trie.check(codes.data()[i] < (unicode ? kCodes : 256) && (i == 0 || codes.data()[i - 1] < codes.data()[i]));
    trie.code_.assign(codes.data(), codes.data() + characters);
    trie.index_characters();
    std::vector<int64_t> length(1 + characters, 1);
    const int32_t newline = trie.symbol(kNewline);
    for (int64_t i = 0; i < parents.size(); ++i) {
      const int32_t parent = parents.data()[i], symbol = symbols.data()[i];
      trie.check(parent > 0 && parent < 1 + characters + i && parent != newline);
      trie.check(symbol > 0 && symbol <= characters && symbol != newline && length[parent] < max_length);
      trie.check(i == 0 || std::pair(parents.data()[i - 1], symbols.data()[i - 1]) < std::pair(parent, symbol));
      length.push_back(length[parent] + 1);
      trie.parent_.push_back(parent);
      trie.symbol_.push_back(symbol);
    }
    trie.place_edges();
    return trie;
  }

  // ids [B, T, K] of the units of length k + 1 that start at each position of each text, -1 if there is no such unit,
  // and the lengths [B] of the texts
  py::tuple map(const py::list& list, int64_t threads) const {
    const Texts texts(list);
    const std::vector<Text>& text = texts.text;
    if (!text.empty() && texts.unicode != unicode_)
      throw py::type_error(unicode_ ? "texts: this is a lexicon of str, got bytes"
                                    : "texts: this is a lexicon of bytes, got str");
    py::array_t<int64_t> lengths(text.size());
    int64_t longest = 0;
    for (size_t b = 0; b < text.size(); ++b) longest = std::max(longest, lengths.mutable_data()[b] = text[b].size);
    const int64_t rows = static_cast<int64_t>(text.size()) * longest;
    py::array_t<int64_t> ids(std::vector<int64_t>{static_cast<int64_t>(text.size()), longest, max_length_});
    int64_t* const out = ids.mutable_data();
    {
      py::gil_scoped_release release;
      parallel_parts(rows, parts_of(rows, threads), [&](int64_t, int64_t lo, int64_t hi) {
        for (int64_t row = lo; row < hi;) {
          const int64_t t = row % longest, end = std::min(longest, t + hi - row);
          map_part(text[row / longest], t, end, out + row * max_length_);
          row += end - t;
        }
      });
    }
    return py::make_tuple(ids, lengths);
  }

  bool unicode() const { return unicode_; }
  int64_t max_length() const { return max_length_; }
  int64_t size() const { return static_cast<int64_t>(1 + code_.size() + parent_.size()); }
  Codes codes() const { return Codes(code_.size(), code_.data()); }
  Ids parents() const { return Ids(parent_.size(), parent_.data()); }
  Ids symbols() const { return Ids(symbol_.size(), symbol_.data()); }

 private:
  struct Slot {
    int32_t parent, child;
  };

  Trie(bool unicode, int64_t max_length) : unicode_(unicode), max_length_(max_length) {}

  void check(bool holds) const {
    if (!holds) throw py::value_error("the units of the lexicon contradict each other");
  }

  // the id of a character, 0 if it is unknown
  int32_t symbol(uint32_t code) const { return code < index_.size() ? index_[code] : 0; }

  void index_characters() {
    index_.assign(code_.empty() ? 0 : code_.back() + 1, 0);
    for (size_t i = 0; i < code_.size(); ++i) index_[code_[i]] = static_cast<int32_t>(i + 1);
  }

  void count_characters(const std::vector<Text>& texts) {
    std::vector<uint8_t> seen(kCodes);
    for (const Text& text : texts)
      with_characters(text, [&](auto* c) {
        for (int64_t t = 0; t < text.size; ++t) seen[c[t]] = 1;
      });
    for (int64_t c = 0; c < kCodes; ++c)
      if (seen[c]) code_.push_back(static_cast<uint32_t>(c));
    index_characters();
  }

  // A frequent n-gram consists of two frequent (n-1)-grams that start at consecutive positions. Their ids are the key
  // of the n-gram. Sorting n-grams of one length by key sorts them by their characters.
  void count_ngrams(const std::vector<Text>& texts, int64_t min_count, int64_t threads) {
    if (max_length_ < 2) return;
    std::vector<int32_t> unit;  // the unit of the current length that starts at each position, -1 if none
    const int64_t total = std::accumulate(texts.begin(), texts.end(), int64_t(0),
                                          [](int64_t n, const Text& text) { return n + text.size + 1; });
    if (total > INT32_MAX) throw py::value_error("texts: expected less than 2**31 characters in all");
    unit.reserve(total);
    for (const Text& text : texts) {
      with_characters(text, [&](auto* c) {
        for (int64_t t = 0; t < text.size; ++t) unit.push_back(c[t] == kNewline ? -1 : symbol(c[t]));
      });
      unit.push_back(-1);  // no n-gram crosses the end of a text
    }
    std::vector<int32_t> last_symbol(1 + code_.size());
    std::iota(last_symbol.begin(), last_symbol.end(), 0);
    const int64_t parts = parts_of(total, threads);
    for (int64_t length = 2; length <= max_length_; ++length) {
      std::vector<Counter> counter(parts);
      std::vector<int32_t> next_unit(parts, -1);  // first unit after each part, read before another thread changes it
      for (int64_t p = 0; p + 1 < parts; ++p) next_unit[p] = unit[total * (p + 1) / parts];
      parallel_parts(total, parts, [&](int64_t p, int64_t lo, int64_t hi) {
        Counter local;
        for (int64_t t = lo; t < hi; ++t) {
          const int32_t left = unit[t], right = t + 1 < hi ? unit[t + 1] : next_unit[p];
          unit[t] = left < 0 || right < 0 ? -1 : local.add(uint64_t(left) << 32 | uint32_t(right), 1);
        }
        counter[p] = std::move(local);
      });
      Counter all;
      std::vector<std::vector<int32_t>> new_ids(parts);  // maps entries of a part to entries of `all`, then to units
      for (int64_t p = 0; p < parts; ++p) {
        new_ids[p].resize(counter[p].size());
        counter[p].each([&](const Counter::Slot& s) { new_ids[p][s.entry] = all.add(s.key, s.count); });
      }
      std::vector<Counter::Slot> kept;
      all.each([&](const Counter::Slot& s) {
        if (s.count >= min_count) kept.push_back(s);
      });
      std::sort(kept.begin(), kept.end(), [](auto& a, auto& b) { return a.key < b.key; });
      std::vector<int32_t> name(all.size(), -1);
      for (const Counter::Slot& s : kept) {
        name[s.entry] = static_cast<int32_t>(size());
        parent_.push_back(static_cast<int32_t>(s.key >> 32));
        symbol_.push_back(last_symbol[static_cast<uint32_t>(s.key)]);
        last_symbol.push_back(symbol_.back());
      }
      if (kept.empty() || length == max_length_) return;
      parallel_parts(total, parts, [&](int64_t p, int64_t lo, int64_t hi) {
        for (int32_t& entry : new_ids[p]) entry = name[entry];
        for (int64_t t = lo; t < hi; ++t) unit[t] = unit[t] < 0 ? -1 : new_ids[p][unit[t]];
      });
    }
  }

  // Finds a shift for each node's row of children, longest rows first, such that all children fall on free slots.
  void place_edges() {
    std::vector<int32_t> first;  // first n-gram of each row; n-grams are sorted by parent
    for (size_t i = 0; i < parent_.size(); ++i)
      if (i == 0 || parent_[i] != parent_[i - 1]) first.push_back(static_cast<int32_t>(i));
    const auto end = [&](int32_t i) {
      return std::upper_bound(parent_.begin() + i, parent_.end(), parent_[i]) - parent_.begin();
    };
    std::stable_sort(first.begin(), first.end(), [&](int32_t a, int32_t b) { return end(a) - a > end(b) - b; });
    size_t slots = 16;
    while (slots < 2 * parent_.size() || slots <= code_.size()) slots *= 2;
    while (!place_rows(first, end, slots)) slots *= 2;
  }

  template <class End>
  bool place_rows(const std::vector<int32_t>& first, const End& end, size_t slots) {
    constexpr int kTries = 4096;
    edge_.assign(slots, {-2, -1});
    shift_.assign(size() + 1, 0);
    mask_ = static_cast<uint32_t>(slots - 1);
    uint32_t shift = 0;
    for (const int32_t i : first) {
      const int32_t stop = static_cast<int32_t>(end(i));
      const auto fits = [&] {
        for (int32_t j = i; j < stop; ++j)
          if (edge_[(shift + symbol_[j]) & mask_].parent != -2) return false;
        return true;
      };
      int tries = 0;
      while (!fits()) {
        if (++tries == kTries) return false;
        shift = shift * 1664525u + 1013904223u;  // a linear congruential generator that visits every slot
      }
      shift_[parent_[i] + 1] = shift;
      for (int32_t j = i; j < stop; ++j)
        edge_[(shift + symbol_[j]) & mask_] = {parent_[i], static_cast<int32_t>(1 + code_.size()) + j};
    }
    return true;
  }

  // the unit `node` extended by one character, -1 if there is none; units -1 and 0 have no children
  int32_t child(int32_t node, int32_t symbol) const {
    const Slot slot = edge_[(shift_[node + 1] + static_cast<uint32_t>(symbol)) & mask_];
    return slot.parent == node ? slot.child : -1;
  }

  // maps positions [begin, end) of a text; positions past the end of the text have no units
  void map_part(const Text& text, int64_t begin, int64_t end, int64_t* out) const {
    constexpr int64_t kBlock = 1024;
    const int64_t width = max_length_, stop = std::min(end, text.size);
    std::vector<int32_t> symbols(kBlock + width);
    for (int64_t t0 = begin; t0 < stop; t0 += kBlock) {
      const int64_t rows = std::min(kBlock, stop - t0);
      with_characters(text, [&](auto* c) {
        const int64_t known = std::min(rows + width, text.size - t0);
        for (int64_t t = 0; t < known; ++t) symbols[t] = symbol(c[t0 + t]);
        std::fill(symbols.begin() + known, symbols.end(), 0);
      });
      for (int64_t t = 0; t < rows; ++t, out += width) {
        int32_t node = symbols[t];
        out[0] = node;
        int64_t k = 1;
        for (; k < width && node > 0; ++k) out[k] = node = child(node, symbols[t + k]);
        for (; k < width; ++k) out[k] = -1;
      }
    }
    if (stop < end) std::fill(out, out + (end - std::max(stop, begin)) * width, -1);
  }

  bool unicode_;
  int64_t max_length_;
  std::vector<uint32_t> code_;            // code point of each character, ascending; character i is unit i + 1
  std::vector<int32_t> parent_, symbol_;  // of each n-gram: the unit without its last character, and that character
  std::vector<int32_t> index_;            // unit of each code point
  std::vector<Slot> edge_;
  std::vector<uint32_t> shift_;           // shift of the row of each unit, starting with unit -1
  uint32_t mask_ = 0;
};

}  // namespace

PYBIND11_MODULE(_lexicon, m) {
  m.doc() = "The trie behind sukhops.Lexicon, which checks its arguments.";
  py::class_<Trie>(m, "Trie")
      .def_static("count", &Trie::count, py::arg("texts"), py::arg("max_length"), py::arg("min_count"),
                  py::arg("threads"))
      .def_static("of", &Trie::of, py::arg("unicode"), py::arg("max_length"), py::arg("codes"), py::arg("parents"),
                  py::arg("symbols"))
      .def("map", &Trie::map, py::arg("texts"), py::arg("threads"))
      .def_property_readonly("unicode", &Trie::unicode)
      .def_property_readonly("max_length", &Trie::max_length)
      .def_property_readonly("codes", &Trie::codes)
      .def_property_readonly("parents", &Trie::parents)
      .def_property_readonly("symbols", &Trie::symbols)
      .def("__len__", &Trie::size);
}
