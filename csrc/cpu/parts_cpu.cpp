// gather_parts_ and scatter_parts_ on CPU: checks, how each part lies in its whole, and one split of all rows among the
// threads.
#include <torch/library.h>

#include <map>

#include "check.h"
#include "cpu/kernels/part_copy.h"
#include "cpu/parallel.h"

namespace prunekernels {
namespace {

constexpr int64_t kMostDims = 5;
constexpr int64_t kChunk = 32 << 10;  // elements; vectors are one row, which threads share in such pieces
constexpr int64_t kLongRun = 8;       // single elements in runs this long on average are copied run by run

// ---- lists

struct List {  // of rows or columns; null: all, in order
  const int64_t* at = nullptr;
  int64_t size = 0;
  int64_t groups = 1;  // lists of `size` columns one behind the other, each of as many rows of the part

  List of_group(int64_t group) const { return {at == nullptr ? nullptr : at + group * size, size}; }
};

struct ListFacts {
  int64_t least = 0, most = -1, runs = 0;
};

// What is read from each list once, however many tensors have it.
class Lists {
 public:
  List rows(const char* op, size_t i, const std::optional<at::Tensor>& index, int64_t size) {
    if (!index) return {nullptr, size};
    check_form(op, "rows", i, *index, index->dim() == 1, "None, or int64 [length] on the CPU");
    return checked(op, "rows", i, *index, size);
  }

  // rows: how many the part has.
  List columns(const char* op, size_t i, const std::optional<at::Tensor>& index, int64_t size, int64_t rows) {
    if (!index) return {nullptr, size};
    check_form(op, "columns", i, *index, index->dim() == 1 || index->dim() == 2,
               "None, or int64 [length] or [groups, length] on the CPU");
    PK_CHECK(index->dim() == 1 || (index->size(0) > 0 && rows % index->size(0) == 0), op, c10::str("columns[", i, "]"),
             c10::str("as many groups as divide ", rows, " rows"), index->sizes());
    return checked(op, "columns", i, *index, size);
  }

  const ListFacts& facts(const List& list) {
    const auto [found, is_new] = facts_.try_emplace({list.at, list.size});
    ListFacts& known = found->second;
    if (is_new)
      for (int64_t j = 0; j < list.size; ++j) {
        known.least = std::min(known.least, list.at[j]);
        known.most = std::max(known.most, list.at[j]);
        if (j == 0 || !continues(list, j)) ++known.runs;
      }
    return known;
  }

  const std::vector<ColumnRun>& runs(const List& list) {
    const auto [found, is_new] = runs_.try_emplace({list.at, list.size});
    if (is_new)
      for (int64_t j = 0; j < list.size; ++j)
        if (j == 0 || !continues(list, j))
          found->second.push_back({list.at[j], j, 1});
        else
          ++found->second.back().length;
    return found->second;
  }

 private:
  static void check_form(const char* op, const char* argument, size_t i, const at::Tensor& index, bool has_dims,
                         const char* expected) {
    PK_CHECK(index.device().is_cpu() && index.scalar_type() == at::kLong && has_dims, op,
             c10::str(argument, "[", i, "]"), expected, index.dtype(), " ", index.sizes(), " on ", index.device());
  }

  List checked(const char* op, const char* argument, size_t i, const at::Tensor& index, int64_t size) {
    tensors_.push_back(index.contiguous());
    const List list{tensors_.back().const_data_ptr<int64_t>(), index.size(-1), index.dim() == 2 ? index.size(0) : 1};
    for (int64_t group = 0; group < list.groups; ++group) {
      const ListFacts& known = facts(list.of_group(group));
      PK_CHECK(known.least >= -1 && known.most < size, op, c10::str(argument, "[", i, "]"),
               c10::str("entries from -1 to ", size - 1), known.least < -1 ? known.least : known.most);
    }
    return list;
  }

  static bool continues(const List& list, int64_t j) {
    return list.at[j - 1] < 0 ? list.at[j] < 0 : list.at[j] == list.at[j - 1] + 1;
  }

  std::vector<at::Tensor> tensors_;
  std::map<std::pair<const int64_t*, int64_t>, ListFacts> facts_;
  std::map<std::pair<const int64_t*, int64_t>, std::vector<ColumnRun>> runs_;
};

// ---- checks

void check_tensor(const char* op, const char* argument, size_t i, const at::Tensor& tensor) {
  const auto name = [&] { return c10::str(argument, "[", i, "]"); };
  PK_CHECK(tensor.layout() == at::kStrided, op, name(), "a dense tensor", tensor.layout());
  PK_CHECK(pick_gather_rows(tensor.element_size()) != nullptr && !tensor.is_complex(), op, name(),
           "real elements of 1, 2, 4 or 8 bytes", tensor.dtype());
  PK_CHECK(tensor.dim() >= 1 && tensor.dim() <= kMostDims, op, name(), c10::str("1 to ", kMostDims, " dimensions"),
           tensor.sizes());
}

// Addresses of the first byte and of that behind the last.
std::pair<const char*, const char*> extent(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return {nullptr, nullptr};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * tensor.element_size()};
}

void check_memory(const char* op, const char* argument, size_t i, const at::Tensor& written, const at::Tensor& read) {
  const auto name = [&] { return c10::str(argument, "[", i, "]"); };
  for (int64_t d = 0; d < written.dim() && written.numel() != 0; ++d)
    PK_CHECK(written.size(d) < 2 || written.stride(d) != 0, op, name(), "a tensor that holds each element once",
             "strides ", written.strides());
  const auto [begin, end] = extent(written);
  const auto [read_begin, read_end] = extent(read);
  PK_CHECK(end <= read_begin || read_end <= begin, op, name(), "memory of its own, for the part and for its whole",
           "two tensors in the same memory");
}

// ---- how a part lies in its whole

// Dimensions that both tensors hold as one become one; the one that is innermost in the whole comes last.
std::vector<PartDim> merged(std::vector<PartDim> dims) {
  std::sort(dims.begin(), dims.end(), [](const PartDim& a, const PartDim& b) { return a.whole > b.whole; });
  std::vector<PartDim> done;
  for (const PartDim& dim : dims)
    if (!done.empty() && done.back().whole == dim.whole * dim.size && done.back().part == dim.part * dim.size)
      done.back() = {done.back().size * dim.size, dim.whole, dim.part};
    else
      done.push_back(dim);
  return done;
}

// dims: of a row, without the columns if there is a list of them.
PartCopy part_copy(const PartDim& row, const List& rows, const PartDim* column, const List& columns,
                   std::vector<PartDim> dims, Lists& lists) {
  PartCopy copy{};
  copy.rows = rows.at;
  copy.whole_row = row.whole;
  copy.part_row = row.part;
  copy.block = 1;
  copy.column = {1, 0, 0};
  dims = merged(std::move(dims));
  if (!dims.empty() && dims.back().whole == 1 && dims.back().part == 1) {
    copy.block = dims.back().size;
    dims.pop_back();
  }
  if (column != nullptr) {
    copy.column = *column;
    copy.columns = columns.at;
    const ListFacts& facts = lists.facts(columns);
    copy.gaps = facts.least < 0;
    const bool adjacent = column->whole == copy.block && column->part == copy.block;
    if (adjacent && (copy.block > 1 || columns.size >= kLongRun * facts.runs)) {
      const std::vector<ColumnRun>& runs = lists.runs(columns);
      copy.runs = runs.data();
      copy.run_count = static_cast<int64_t>(runs.size());
    }
  } else if (copy.block == 1 && !dims.empty()) {
    copy.column = dims.back();
    dims.pop_back();
  }
  dims.resize(std::size(copy.outer), {1, 0, 0});
  std::copy(dims.begin(), dims.end(), copy.outer);
  return copy;
}

struct Piece {
  PartCopy copy;
  PartRows kernel;
  int64_t rows;
  int64_t cost;  // in floats
};

class Pieces {
 public:
  Pieces(const char* op, bool gather) : op_(op), gather_(gather) {}

  void add(size_t i, const at::Tensor& part, const at::Tensor& whole, const std::optional<at::Tensor>& rows,
           const std::optional<at::Tensor>& columns) {
    check_tensor(op_, "parts", i, part);
    check_tensor(op_, "wholes", i, whole);
    const auto name = [&] { return c10::str("parts[", i, "]"); };
    PK_CHECK(part.dtype() == whole.dtype(), op_, name(), c10::str(whole.dtype(), " as its whole"), part.dtype());
    PK_CHECK(whole.dim() > 1 || !columns, op_, c10::str("columns[", i, "]"), "None, for a tensor of one dimension",
             columns->sizes());
    std::vector<int64_t> size = whole.sizes().vec();
    const List row_list = lists_.rows(op_, i, rows, size[0]);
    size[0] = row_list.size;
    List column_list;
    if (whole.dim() > 1) {
      column_list = lists_.columns(op_, i, columns, size[1], size[0]);
      size[1] = column_list.size;
    }
    PK_CHECK(part.sizes() == size, op_, name(), c10::IntArrayRef(size), part.sizes());
    if (gather_)
      check_memory(op_, "parts", i, part, whole);
    else
      check_memory(op_, "wholes", i, whole, part);
    if (part.numel() == 0) return;
    if (whole.dim() == 1)
      add_vector(part, whole, row_list);
    else
      add_rows(part, whole, row_list, column_list);
  }

  void run() const {
    std::vector<int64_t> costs;
    for (const Piece& piece : pieces_) costs.push_back(piece.cost);
    share_among_threads(costs, [&](ThreadState&, size_t i, int64_t first, int64_t last) {
      const RowRange range(first, last, pieces_[i].cost, pieces_[i].rows);
      pieces_[i].kernel(pieces_[i].copy, range.begin, range.end);
    });
  }

 private:
  static PartDim dim(const at::Tensor& part, const at::Tensor& whole, int64_t d) {
    return {part.size(d), whole.stride(d), part.stride(d)};
  }

  // One piece for each group of columns.
  void add_rows(const at::Tensor& part, const at::Tensor& whole, const List& rows, const List& columns) {
    std::vector<PartDim> dims;
    for (int64_t d = columns.at != nullptr ? 2 : 1; d < part.dim(); ++d)
      if (part.size(d) > 1) dims.push_back(dim(part, whole, d));
    const PartDim row = dim(part, whole, 0), column = dim(part, whole, 1);
    const int64_t count = part.size(0) / columns.groups;
    for (int64_t group = 0; group < columns.groups; ++group) {
      const int64_t begin = group * count;
      const List own{rows.at != nullptr ? rows.at + begin : nullptr, count};
      const PartCopy copy =
          part_copy(row, own, columns.at != nullptr ? &column : nullptr, columns.of_group(group), dims, lists_);
      push(copy, part, whole, begin * row.part, rows.at != nullptr ? 0 : begin * row.whole, count,
           part.numel() / columns.groups);
    }
  }

  // One row, whose columns are the rows that were asked for.
  void add_vector(const at::Tensor& part, const at::Tensor& whole, const List& rows) {
    for (int64_t begin = 0; begin < rows.size; begin += kChunk) {
      const int64_t size = std::min(kChunk, rows.size - begin);
      PartDim column = dim(part, whole, 0);
      column.size = size;
      const List list{rows.at != nullptr ? rows.at + begin : nullptr, size};
      const PartCopy copy =
          part_copy({1, 0, 0}, {}, rows.at != nullptr ? &column : nullptr, list,
                    rows.at != nullptr ? std::vector<PartDim>{} : std::vector<PartDim>{column}, lists_);
      push(copy, part, whole, begin * column.part, rows.at != nullptr ? 0 : begin * column.whole, 1, size);
    }
  }

  void push(PartCopy copy, const at::Tensor& part, const at::Tensor& whole, int64_t part_offset, int64_t whole_offset,
            int64_t rows, int64_t elements) {
    const int64_t bytes = part.element_size();
    const at::Tensor &written = gather_ ? part : whole, &read = gather_ ? whole : part;
    char* to = static_cast<char*>(written.mutable_data_ptr());
    char* from = const_cast<char*>(static_cast<const char*>(read.const_data_ptr()));  // PartCopy goes both ways
    copy.part = (gather_ ? to : from) + part_offset * bytes;
    copy.whole = (gather_ ? from : to) + whole_offset * bytes;
    const PartRows kernel = gather_ ? pick_gather_rows(bytes) : pick_scatter_rows(bytes);
    pieces_.push_back({copy, kernel, rows, std::max(elements * bytes / 4, int64_t{1})});
  }

  const char* op_;
  bool gather_;
  Lists lists_;
  std::vector<Piece> pieces_;
};

void move_parts(const char* op, bool gather, at::TensorList parts, at::TensorList wholes, const OptionalTensors& rows,
                const OptionalTensors& columns) {
  const std::pair<const char*, size_t> lengths[] = {
      {"wholes", wholes.size()}, {"rows", rows.size()}, {"columns", columns.size()}};
  for (const auto& [argument, length] : lengths)
    PK_CHECK(length == parts.size(), op, argument, c10::str(parts.size(), " entries, one per part"), length);
  Pieces pieces(op, gather);
  for (size_t i = 0; i < parts.size(); ++i) pieces.add(i, parts[i], wholes[i], rows.get(i), columns.get(i));
  for (const at::Tensor& written : gather ? parts : wholes) written.unsafeGetTensorImpl()->bump_version();
  pieces.run();
}

void gather_parts(at::TensorList parts, at::TensorList wholes, const OptionalTensors& rows,
                  const OptionalTensors& columns) {
  move_parts("gather_parts_", true, parts, wholes, rows, columns);
}

void scatter_parts(at::TensorList wholes, at::TensorList parts, const OptionalTensors& rows,
                   const OptionalTensors& columns) {
  move_parts("scatter_parts_", false, parts, wholes, rows, columns);
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("gather_parts_", gather_parts);
  m.impl("scatter_parts_", scatter_parts);
}

}  // namespace prunekernels
