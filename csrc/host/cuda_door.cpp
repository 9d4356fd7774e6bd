#include "host/cuda_door.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/cached_rows.h"
#include "common/decode_tiles.h"
#include "common/fragments.h"
#include "common/split_schedule.h"
#include "common/ticket.h"

namespace ea::host {
namespace {

using Places = std::vector<std::pair<int, int>>;

// What every lane has in each of its registers, as (row, column) of the first number there.
std::vector<Places> fragment(const std::string& name) {
  std::vector<Places> lanes(32);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < (name == "right" ? 2 : 4); ++i) {
      if (name == "left") {
        lanes[lane].emplace_back(fragments::left_row(lane, i), fragments::left_column(lane, i));
      } else if (name == "right") {
        lanes[lane].emplace_back(fragments::right_row(lane, i), fragments::right_column(lane));
      } else if (name == "product") {
        lanes[lane].emplace_back(
            fragments::product_row(lane, i), fragments::product_column(lane, i));
      } else {
        throw std::invalid_argument("there is no fragment " + name + ".");
      }
    }
  }
  return lanes;
}

// The row and the granule that every lane asks ldmatrix for.
Places load_places(const std::string& name) {
  Places places;
  for (int lane = 0; lane < 32; ++lane) {
    const auto place = name == "left"    ? fragments::left_place(lane)
                       : name == "right" ? fragments::right_place(lane)
                                         : fragments::deep_right_place(lane);
    places.emplace_back(place.row, place.granule);
  }
  return places;
}

// The keys of each split that has some, as (first, end).
Places split_keys(int num_keys, int num_splits, int smallest) {
  const SplitSchedule schedule = ea::split_keys(num_keys, num_splits, smallest);
  Places splits;
  for (int s = 0; s < schedule.used; ++s) {
    splits.emplace_back(schedule.first(s), schedule.end(s, num_keys));
  }
  return splits;
}

// The parts that are merged together, each time into the first: groups, then what is left of them.
std::vector<std::vector<int>> mergers(int used) {
  std::vector<std::vector<int>> all;
  const auto add = [&](const Merger& merger) {
    all.emplace_back();
    for (int i = 0; i < merger.count; ++i) all.back().push_back(merger.part(i));
  };
  for (int group = 0; group < merge_groups(used); ++group) add(within_group(group, used));
  if (merge_groups(used) > 1) add(between_groups(used));
  return all;
}

// The readers of a key head, as tiles find them.
std::vector<int> readers(const std::vector<int32_t>& q_to_k, int key_head) {
  const int heads = int(q_to_k.size()), count = count_readers(q_to_k.data(), heads, key_head);
  std::vector<int> found;
  for (int r = 0; r <= count; ++r) {
    found.push_back(find_reader(q_to_k.data(), heads, key_head, r));
  }
  return found;
}

// Where a token of a sequence is, in bytes; without a table every sequence has a page.
template <typename Integer>
int64_t cached_offset(const std::vector<std::vector<Integer>>& table, int64_t page_size,
                      int64_t sequence, int64_t token, int64_t page_step, int64_t row_step) {
  std::vector<Integer> flat;
  for (const auto& row : table) flat.insert(flat.end(), row.begin(), row.end());
  PageTable pages{};
  if (!table.empty()) {
    pages = {{flat.data(), 1, sizeof(Integer) == 8}, int64_t(table[0].size()), page_size};
  }
  return pages.token(sequence, token).offset_in({nullptr, page_step, 0, row_step});
}

}  // namespace

void add_cuda_doors(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("fragment", &fragment, py::arg("name"),
        "What lanes hold in a product of matrices: (row, column) for each register.");
  m.def("load_places", &load_places, py::arg("name"),
        "The rows and granules of which lanes pass the address to ldmatrix.");
  m.def("swizzled", &fragments::swizzled, py::arg("row"), py::arg("granule"), py::arg("granules"),
        "Where a granule lies in shared memory.");
  m.def("split_keys", &split_keys, py::arg("num_keys"), py::arg("num_splits"),
        py::arg("smallest"), "The keys of each split as (first, end).");
  m.def("mergers", &mergers, py::arg("used"), "Which parts are merged together, in their order.");
  m.def("fewest_splits", &fewest_splits, py::arg("tiles"), py::arg("blocks"),
        py::arg("num_keys"), py::arg("smallest"), py::arg("most"),
        "The fewest splits that a device is done with about as soon as with any number of them.");
  m.def("most_tiles", &most_tiles, py::arg("heads"), py::arg("tokens"), py::arg("key_heads"),
        py::arg("rows"), "The most tiles that a map can make.");
  m.def("readers", &readers, py::arg("q_to_k"), py::arg("key_head"),
        "The query heads that read a key head, and -1.");
  m.def("cached_offset", &cached_offset<int32_t>, py::arg("table"), py::arg("page_size"),
        py::arg("sequence"), py::arg("token"), py::arg("page_step"), py::arg("row_step"),
        "Where a cached token lies, by a table of 32-bit integers.");
  m.def("cached_offset_wide", &cached_offset<int64_t>, py::arg("table"), py::arg("page_size"),
        py::arg("sequence"), py::arg("token"), py::arg("page_step"), py::arg("row_step"),
        "The same, by a table of 64-bit integers.");
  m.def("clamped_length", &clamped_length, py::arg("length"), py::arg("capacity"),
        "A length within what there is.");
  m.def("arrive", [](uint64_t word, uint64_t call, int expected) {
          const Arrival arrival = arrive(word, call, expected);
          return std::make_pair(arrival.word, arrival.is_last);
        }, py::arg("word"), py::arg("call"), py::arg("expected"),
        "A ticket after one more block of a call has come, and whether it was the last.");
}

}  // namespace ea::host
