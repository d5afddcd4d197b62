// Products of a step's tokens with packed matrices of several members, and attention over pages, on a CPU.
//
// Every output is one sum in one order, whatever stands beside it in the batch: a product adds over D from first to
// last, a softmax and its values over positions from first to last, lane by lane. So a token's results have the same
// bits alone or among others, in one chunk or in many. Contraction to fused multiply-adds is off but where `fma` is
// written: the compiler must not choose it in one instance of a template and not in another.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// ---- vectors of LANES numbers: what one register of this machine holds

#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_TILE = 12, MAX_ROWS = 8, MAX_VALUE_ROWS = 4;  // 24 sums in 32 registers
#elif defined(__FMA__)
constexpr int LANES = 8, MAX_TILE = 6, MAX_ROWS = 2, MAX_VALUE_ROWS = 2;  // 12 in 16
#elif defined(__aarch64__)
constexpr int LANES = 4, MAX_TILE = 12, MAX_ROWS = 2, MAX_VALUE_ROWS = 4;  // 24 in 32
#else
constexpr int LANES = 4, MAX_TILE = 6, MAX_ROWS = 1, MAX_VALUE_ROWS = 2;
#endif
constexpr int PANEL = 2 * LANES;  // outputs that are summed side by side
constexpr int PAGE = 16;          // positions in a page: PAGE_TOKENS in paged.py
constexpr int PARTS = PAGE / LANES;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline Vec all(float value) { return value - Vec{}; }  // a bare broadcast; value + 0 is an addition, for the sake of -0

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vec load(const uint16_t* from) {  // bfloat16: the upper half of a float32
  Halves h;
  std::memcpy(&h, from, sizeof h);
  return (Vec)(__builtin_convertvector(h, Bits) << 16);
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even, as torch rounds
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float to_float(float value) { return value; }
inline float to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) { *to = to_bfloat16(value); }

inline float sum(Vec v) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += v[lane];
  return total;
}

// e^x with a relative error near 1e-7: 2^n e^r, r within half of ln 2, by its Taylor series. Zero below -87.
inline Vec exp(Vec x) {
  const Vec lowest = all(-87.f), highest = all(88.f);
  const Vec inside = x < lowest ? lowest : (x > highest ? highest : x);
  const Vec shifter = all(12582912.f);  // 1.5 * 2^23: what is added to it is rounded to whole numbers
  const Vec shifted = fma(inside, all(1.44269504f), shifter);
  const Vec n = shifted - shifter;
  Vec r = fma(n, all(-0.693359375f), inside);  // ln 2 in two parts, the first exact in products with n
  r = fma(n, all(2.12194440e-4f), r);
  Vec y = all(1.f / 5040);
  for (float term : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) y = fma(y, r, all(term));
  const Bits power = ((Bits)shifted - (Bits)shifter + 127) << 23;
  return x < lowest ? Vec{} : y * (Vec)power;
}

inline float exp(float x) { return exp(all(x))[0]; }

inline Vec tanh(Vec x) { return all(1.f) - 2.f / (exp(x + x) + 1.f); }

// ---- tensors

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// x with its last dimensions dense, so that a stride leads from one token to the next; a copy only where it must be.
Tensor dense_rows(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i > 0; i--) {
    if (x.size(i) > 1 && x.stride(i) != expected) return torch::stable::contiguous(x);
    expected *= x.size(i);
  }
  return x;
}

void expect(const Tensor& x, ScalarType type, int64_t dims, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.dim() == dims, name, ": another dtype or number of dimensions");
}

// ---- products

struct Block {  // tokens first … end-1 of one member
  const void* weights;
  const float* biases;
  int64_t first, end;
};

// Weights of two outputs stand in one 32-bit word each, a lane of the first vector below one of the second.
inline void load_pair(const float* w, Vec& low, Vec& high) { low = load(w), high = load(w + LANES); }
inline void load_pair(const uint16_t* w, Vec& low, Vec& high) {
  Bits both;
  std::memcpy(&both, w, sizeof both);
  low = (Vec)(both << 16), high = (Vec)(both & 0xffff0000u);
}

constexpr int64_t AHEAD_BYTES = 2048;  // how far before its use a weight is asked for: half a page of memory

// Sums of TOKENS tokens and one panel. Meanwhile `ahead`, moved on by `step` bytes a row, is asked for from memory.
template <int TOKENS, typename Weight>
void product(const float* x, int64_t stride, const Weight* w, int64_t depth, const char* ahead, int64_t step,
             float* out) {
  Vec low[TOKENS] = {}, high[TOKENS] = {};
  const float* rows[TOKENS];
  for (int i = 0; i < TOKENS; i++) rows[i] = x + i * stride;
#pragma GCC unroll 2
  for (int64_t d = 0; d < depth; d++, w += PANEL, ahead += step) {
    Vec a, b;
    load_pair(w, a, b);
    __builtin_prefetch(ahead);
#pragma GCC unroll 16
    for (int i = 0; i < TOKENS; i++) {
      const Vec each = all(rows[i][d]);
      low[i] = fma(each, a, low[i]);
      high[i] = fma(each, b, high[i]);
    }
  }
  for (int i = 0; i < TOKENS; i++) store(out + i * PANEL, low[i]), store(out + i * PANEL + LANES, high[i]);
}

template <typename Weight, int TOKENS = MAX_TILE>
void product_of(int64_t tokens, const float* x, int64_t stride, const Weight* w, int64_t depth, const char* ahead,
                int64_t step, float* out) {
  if constexpr (TOKENS > 1)
    if (tokens < TOKENS) return product_of<Weight, TOKENS - 1>(tokens, x, stride, w, depth, ahead, step, out);
  product<TOKENS, Weight>(x, stride, w, depth, ahead, step, out);
}

template <typename Weight>
void multiply(const Block& block, int64_t panel, const float* x, int64_t stride, int64_t depth, float* out,
              int64_t width) {
  const Weight* w = static_cast<const Weight*>(block.weights) + panel * depth * PANEL;
  const int64_t column = panel * PANEL, columns = std::min<int64_t>(PANEL, width - column);
  const int64_t num_tiles = (block.end - block.first + MAX_TILE - 1) / MAX_TILE;
  alignas(64) float sums[MAX_TILE * PANEL];
  for (int64_t tile = 0; tile < num_tiles; tile++) {  // tiles of almost equal size: a small one uses the machine badly
    const int64_t size = block.end - block.first;
    const int64_t first = block.first + size * tile / num_tiles, end = block.first + size * (tile + 1) / num_tiles;
    // One tile waits for its own panel; of several, each fetches a part of the next panel, which finds it in the cache.
    const int64_t row = PANEL * sizeof(Weight), step = row / num_tiles;
    const char* ahead = reinterpret_cast<const char*>(w) + (num_tiles == 1 ? AHEAD_BYTES : depth * (row + tile * step));
    product_of<Weight>(end - first, x + first * stride, stride, w, depth, ahead, step, sums);
    for (int64_t i = 0; i < end - first; i++) {
      float* to = out + (first + i) * width + column;
      if (block.biases)
        for (int64_t c = 0; c < columns; c++) to[c] = sums[i * PANEL + c] + block.biases[column + c];
      else if (columns == PANEL)
        std::memcpy(to, sums + i * PANEL, sizeof(float) * PANEL);
      else
        std::copy_n(sums + i * PANEL, columns, to);
    }
  }
}

constexpr int64_t BLOCK_BYTES = 512 << 10;  // activations that stay in the cache beside the core while panels pass

// Addresses of packed matrices and of biases by slot, 0 where there is none.
Tensor linear(Tensor x_BD, Tensor weights_N, Tensor biases_N, Tensor segments_N3, int64_t num_out, bool is_bfloat16) {
  expect(x_BD, ScalarType::Float, 2, "x_BD");
  const Tensor x = dense_rows(x_BD);
  const int64_t num_tokens = x.size(0), depth = x.size(1), stride = x.stride(0);
  const int64_t num_panels = (num_out + PANEL - 1) / PANEL;
  const int64_t max_tokens = std::max<int64_t>(BLOCK_BYTES / (4 * depth) / MAX_TILE, 1) * MAX_TILE;
  Tensor out = torch::stable::new_empty(x, {num_tokens, num_out});
  const int64_t *segments = data<int64_t>(segments_N3), *weights = data<int64_t>(weights_N);
  std::vector<Block> blocks;
  int64_t end = 0;
  for (int64_t i = 1; i <= segments[0]; i++) {
    const int64_t slot = segments[3 * i];
    STD_TORCH_CHECK(slot >= 0 && slot < weights_N.numel() && weights[slot], "slot ", slot, " holds no matrix");
    STD_TORCH_CHECK(segments[3 * i + 1] == end && segments[3 * i + 2] <= num_tokens, "segments are not side by side");
    end = segments[3 * i + 2];
    const int64_t biases = data<int64_t>(biases_N)[slot];
    for (int64_t first = segments[3 * i + 1]; first < end; first += max_tokens)
      blocks.push_back({reinterpret_cast<const void*>(weights[slot]), reinterpret_cast<const float*>(biases), first,
                        std::min(first + max_tokens, end)});
  }
  const float* from = data<float>(x);
  float* to = data<float>(out);
  std::fill(to + end * num_out, to + num_tokens * num_out, 0.f);  // filling tokens
  const int64_t num_blocks = blocks.size(), num_threads = torch::stable::get_num_threads();
  const auto work = [&](int64_t block, int64_t panel) {
    if (is_bfloat16)
      multiply<uint16_t>(blocks[block], panel, from, stride, depth, to, num_out);
    else
      multiply<float>(blocks[block], panel, from, stride, depth, to, num_out);
  };
#pragma omp parallel num_threads(num_threads) if (num_blocks * num_panels > 1)
  if (num_panels >= num_threads) {  // a thread has the same panels in every block, so blocks of any sizes are fair
    for (int64_t block = 0; block < num_blocks; block++)
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < num_panels; panel++) work(block, panel);
  } else {
#pragma omp for schedule(static) collapse(2)
    for (int64_t block = 0; block < num_blocks; block++)
      for (int64_t panel = 0; panel < num_panels; panel++) work(block, panel);
  }
  return out;
}

// Where the weight of an output and an input stands in a packed matrix.
template <typename Weight>
int64_t place(int64_t output, int64_t input, int64_t depth) {
  const int64_t column = output % PANEL;
  const int64_t in_row = sizeof(Weight) == 4 ? column : column % LANES * 2 + column / LANES;
  return (output / PANEL * depth + input) * PANEL + in_row;
}

template <typename Weight>
void pack_rows(const Tensor& weight_FD, const Tensor& packed) {
  const int64_t num_out = weight_FD.size(0), depth = weight_FD.size(1);
  const int64_t padded = (num_out + PANEL - 1) / PANEL * PANEL;
  const float* from = data<float>(weight_FD);
  Weight* to = data<Weight>(packed);
#pragma omp parallel for num_threads(torch::stable::get_num_threads())
  for (int64_t panel = 0; panel < padded / PANEL; panel++)
    for (int64_t d = 0; d < depth; d++)
      for (int64_t f = panel * PANEL; f < (panel + 1) * PANEL; f++)
        put(to + place<Weight>(f, d, depth), f < num_out ? from[f * depth + d] : 0.f);
}

Tensor pack(Tensor weight_FD, bool is_bfloat16) {
  expect(weight_FD, ScalarType::Float, 2, "weight_FD");
  const Tensor weight = torch::stable::contiguous(weight_FD);
  const int64_t padded = (weight.size(0) + PANEL - 1) / PANEL * PANEL;
  const auto type = is_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor packed = torch::stable::new_empty(weight, {padded * weight.size(1)}, type);
  is_bfloat16 ? pack_rows<uint16_t>(weight, packed) : pack_rows<float>(weight, packed);
  return packed;
}

template <typename Weight>
void gather(const int64_t* tokens, const int64_t* slots, const int64_t* weights, float* out, int64_t num_tokens,
            int64_t width) {
#pragma omp parallel for num_threads(torch::stable::get_num_threads()) if (num_tokens > 1)
  for (int64_t b = 0; b < num_tokens; b++) {
    const Weight* packed = reinterpret_cast<const Weight*>(weights[slots[b]]);
    const Weight* from = packed ? packed + place<Weight>(tokens[b], 0, width) : nullptr;
    // A filling token may name a slot that holds nothing.
    for (int64_t d = 0; d < width; d++) out[b * width + d] = from ? to_float(from[d * PANEL]) : 0.f;
  }
}

Tensor embed(Tensor tokens_B, Tensor slots_B, Tensor weights_N, int64_t num_rows, int64_t width, bool is_bfloat16) {
  const Tensor tokens = torch::stable::contiguous(tokens_B), slots = torch::stable::contiguous(slots_B);
  const int64_t num_tokens = tokens.numel();
  for (int64_t b = 0; b < num_tokens; b++) {
    const int64_t token = data<int64_t>(tokens)[b], slot = data<int64_t>(slots)[b];
    STD_TORCH_CHECK(token >= 0 && token < num_rows, "token ", token, " is not among ", num_rows);
    STD_TORCH_CHECK(slot >= 0 && slot < weights_N.numel(), "there is no slot ", slot);
  }
  Tensor out = torch::stable::new_empty(tokens, {num_tokens, width}, ScalarType::Float);
  (is_bfloat16 ? gather<uint16_t> : gather<float>)(data<int64_t>(tokens), data<int64_t>(slots),
                                                  data<int64_t>(weights_N), data<float>(out), num_tokens, width);
  return out;
}

// ---- attention: pages of keys are [K][E][PAGE], of values [K][PAGE][E rounded up to PAGE]

struct Rules {
  int64_t num_heads, num_kv_heads, head_dim, padded_dim, window, num_sink_tokens;
  float soft_cap;
  const float *sinks, *bias;  // one a head, or null; one a head and distance, or null
  int64_t max_distance;       // of bias
};

struct Tile {  // consecutive positions of one span: they read the same pages
  int64_t first, count, position;  // token, number of tokens, position of the first
  const int32_t* table;
};

constexpr int TILE_TOKENS = 8;

// Products of ROWS queries with the keys of each page in turn. Even and odd places are summed apart: twice the chains.
template <int ROWS, typename Page>
void score(const float* q, const std::vector<int64_t>& pages, const Page* keys, int64_t page_size, int64_t dim,
           float* scores, int64_t stride) {
  for (size_t j = 0; j < pages.size(); j++) {
    const Page* k = keys + pages[j] * page_size;
    const Page* next = keys + pages[std::min(j + 1, pages.size() - 1)] * page_size;
    Vec even[ROWS][PARTS] = {}, odd[ROWS][PARTS] = {};
    int64_t e = 0;
    for (; e + 1 < dim; e += 2) {
      __builtin_prefetch(next + e * PAGE);
      if (sizeof(Page) == 4) __builtin_prefetch(next + (e + 1) * PAGE);
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; part++) {
        const Vec a = load(k + e * PAGE + part * LANES), b = load(k + (e + 1) * PAGE + part * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          even[r][part] = fma(all(q[r * dim + e]), a, even[r][part]);
          odd[r][part] = fma(all(q[r * dim + e + 1]), b, odd[r][part]);
        }
      }
    }
    for (int part = 0; part < PARTS; part++)
      for (int r = 0; r < ROWS; r++) {
        if (e < dim) even[r][part] = fma(all(q[r * dim + e]), load(k + e * PAGE + part * LANES), even[r][part]);
        store(scores + r * stride + j * PAGE + part * LANES, even[r][part] + odd[r][part]);
      }
  }
}

template <typename Page, int ROWS = MAX_ROWS>
void score_of(int64_t rows, const float* q, const std::vector<int64_t>& pages, const Page* keys, int64_t page_size,
              int64_t dim, float* scores, int64_t stride) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return score_of<Page, ROWS - 1>(rows, q, pages, keys, page_size, dim, scores, stride);
  score<ROWS, Page>(q, pages, keys, page_size, dim, scores, stride);
}

// The shares of one query's positions, in place of their scores; returns one over their sum.
float soften(float* scores, const std::vector<int64_t>& columns, int64_t position, int64_t head, const Rules& rules) {
  typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
  const float lowest = -std::numeric_limits<float>::max();
  const Vec scale = all(std::sqrt(static_cast<float>(rules.head_dim)));
  Ints lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
  Vec highest = all(lowest);
  for (size_t j = 0; j < columns.size() * PARTS; j++) {
    const int64_t start = columns[j / PARTS] * PAGE + j % PARTS * LANES;
    Vec s = load(scores + j * LANES) / scale;
    if (rules.soft_cap > 0) s = rules.soft_cap * tanh(s / rules.soft_cap);
    const Ints distance = static_cast<int32_t>(position - start) - lanes;
    Ints allowed = distance >= 0;
    if (rules.window) allowed &= (distance < static_cast<int32_t>(rules.window)) |
                                 (lanes < static_cast<int32_t>(rules.num_sink_tokens - start));
    if (rules.bias)
      for (int lane = 0; lane < LANES; lane++)
        if (allowed[lane]) s[lane] += rules.bias[head * rules.max_distance + distance[lane]];
    s = allowed ? s : all(lowest);  // what lies behind the last token in its page was never written
    highest = highest > s ? highest : s;
    store(scores + j * LANES, s);
  }
  float most = rules.sinks ? rules.sinks[head] : lowest;
  for (int lane = 0; lane < LANES; lane++) most = std::max(most, highest[lane]);
  Vec total = {};
  for (size_t j = 0; j < columns.size() * PARTS; j++) {
    const Vec share = exp(load(scores + j * LANES) - most);
    total += share;
    store(scores + j * LANES, share);
  }
  return 1.f / (sum(total) + (rules.sinks ? exp(rules.sinks[head] - most) : 0.f));
}

// ROWS queries' sums over values, COLUMNS vectors wide, over all pages; the last of them has `last` positions.
template <int ROWS, int COLUMNS, typename Page>
void gather_values(const float* shares, int64_t stride, const std::vector<int64_t>& pages, const Page* values,
                   int64_t page_size, int64_t width, int64_t last, float* out) {
  Vec sums[ROWS][COLUMNS] = {};
  for (size_t j = 0; j < pages.size(); j++) {
    const Page* v = values + pages[j] * page_size;
    const Page* next = values + pages[std::min(j + 1, pages.size() - 1)] * page_size;
    const int64_t count = j + 1 < pages.size() ? PAGE : last;
    for (int64_t s = 0; s < count; s++) {
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++) {
        const Vec value = load(v + s * width + c * LANES);
        __builtin_prefetch(next + s * width + c * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) sums[r][c] = fma(all(shares[r * stride + j * PAGE + s]), value, sums[r][c]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) store(out + r * width + c * LANES, sums[r][c]);
}

template <typename Page, int ROWS = MAX_VALUE_ROWS>
void values_of(int64_t rows, const float* shares, int64_t stride, const std::vector<int64_t>& pages, const Page* values,
               int64_t page_size, int64_t width, int64_t last, float* out) {
  if constexpr (ROWS > 1)
    if (rows < ROWS)
      return values_of<Page, ROWS - 1>(rows, shares, stride, pages, values, page_size, width, last, out);
  int64_t column = 0;
  for (; column + 4 * LANES <= width; column += 4 * LANES)
    gather_values<ROWS, 4, Page>(shares, stride, pages, values + column, page_size, width, last, out + column);
  for (; column < width; column += LANES)
    gather_values<ROWS, 1, Page>(shares, stride, pages, values + column, page_size, width, last, out + column);
}

struct Scratch {  // of one thread
  std::vector<int64_t> columns, pages;  // which of the table are read, and the pages that stand there
  std::vector<float> q, scores, sums, inverses;
};

template <typename Page>
void attend_tile(const Tile& tile, int64_t kv_head, const float* q_BHE, int64_t q_stride, const Page* k_pages,
                 const Page* v_pages, const Rules& rules, Scratch& scratch, float* out_BHE) {
  const int64_t dim = rules.head_dim, width = rules.padded_dim, group = rules.num_heads / rules.num_kv_heads;
  const int64_t k_size = dim * PAGE, v_size = width * PAGE, rows = tile.count * group;
  const int64_t last = tile.position + tile.count - 1;
  const int64_t begin = rules.window ? std::max<int64_t>(tile.position - rules.window + 1, 0) / PAGE : 0;
  auto& [columns, pages, q, scores, sums, inverses] = scratch;
  columns.clear(), pages.clear();
  for (int64_t c = 0; c <= last / PAGE; c++)
    if (c >= begin || c * PAGE < rules.num_sink_tokens) columns.push_back(c), pages.push_back(tile.table[c]);
  const int64_t stride = pages.size() * PAGE;
  q.resize(rows * dim), scores.resize(rows * stride), sums.resize(rows * width), inverses.resize(rows);
  for (int64_t t = 0; t < tile.count; t++)
    std::copy_n(q_BHE + (tile.first + t) * q_stride + kv_head * group * dim, group * dim, &q[t * group * dim]);
  for (int64_t r = 0; r < rows; r += MAX_ROWS)
    score_of<Page>(std::min<int64_t>(MAX_ROWS, rows - r), &q[r * dim], pages, k_pages + kv_head * k_size,
                   rules.num_kv_heads * k_size, dim, &scores[r * stride], stride);
  for (int64_t r = 0; r < rows; r++)
    inverses[r] = soften(&scores[r * stride], columns, tile.position + r / group, kv_head * group + r % group, rules);
  for (int64_t r = 0; r < rows; r += MAX_VALUE_ROWS)
    values_of<Page>(std::min<int64_t>(MAX_VALUE_ROWS, rows - r), &scores[r * stride], stride, pages,
                    v_pages + kv_head * v_size, rules.num_kv_heads * v_size, width, last % PAGE + 1, &sums[r * width]);
  for (int64_t r = 0; r < rows; r++) {
    float* to = out_BHE + ((tile.first + r / group) * rules.num_heads + kv_head * group + r % group) * dim;
    for (int64_t e = 0; e < dim; e++) to[e] = sums[r * width + e] * inverses[r];
  }
}

template <typename Page>
void attend_pages(const Tensor& q, const Tensor& k, const Tensor& v, Page* k_pages, Page* v_pages,
                  const std::vector<Tile>& tiles, const Rules& rules, float* out) {
  const int64_t dim = rules.head_dim, width = rules.padded_dim, kv_heads = rules.num_kv_heads;
  const int64_t num_items = tiles.size() * kv_heads;
#pragma omp parallel num_threads(torch::stable::get_num_threads()) if (num_items > 1)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_items; item++) {
      const Tile& tile = tiles[item / kv_heads];
      const int64_t head = item % kv_heads;
      for (int64_t t = 0; t < tile.count; t++) {
        const int64_t position = tile.position + t, place = tile.table[position / PAGE] * kv_heads + head;
        const float* from_k = data<float>(k) + (tile.first + t) * k.stride(0) + head * dim;
        const float* from_v = data<float>(v) + (tile.first + t) * v.stride(0) + head * dim;
        for (int64_t e = 0; e < dim; e++) {
          put(k_pages + (place * dim + e) * PAGE + position % PAGE, from_k[e]);
          put(v_pages + (place * PAGE + position % PAGE) * width + e, from_v[e]);
        }
      }
    }
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)  // lengths differ
    for (int64_t item = 0; item < num_items; item++)
      attend_tile<Page>(tiles[item / kv_heads], item % kv_heads, data<float>(q), q.stride(0), k_pages, v_pages, rules,
                        scratch, out);
  }
}

Tensor attend(Tensor q_BHE, Tensor k_BKE, Tensor v_BKE, Tensor k_pages, Tensor v_pages, Tensor tables_NC,
              Tensor spans_B, Tensor positions_B, int64_t window, int64_t num_sink_tokens, double soft_cap,
              std::optional<Tensor> sinks_H, std::optional<Tensor> bias_HS) {
  for (const Tensor* x : {&q_BHE, &k_BKE, &v_BKE}) expect(*x, ScalarType::Float, 3, "queries, keys or values");
  expect(tables_NC, ScalarType::Int, 2, "tables_NC");
  const Tensor q = dense_rows(q_BHE), k = dense_rows(k_BKE), v = dense_rows(v_BKE), tables = dense_rows(tables_NC);
  const Tensor spans = torch::stable::contiguous(spans_B), positions = torch::stable::contiguous(positions_B);
  const std::optional<Tensor> sinks = sinks_H ? std::optional(torch::stable::contiguous(*sinks_H)) : sinks_H;
  const std::optional<Tensor> bias = bias_HS ? std::optional(torch::stable::contiguous(*bias_HS)) : bias_HS;
  for (const auto& x : {sinks, bias}) STD_TORCH_CHECK(!x || x->scalar_type() == ScalarType::Float, "not float32");
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), dim = q.size(2);
  STD_TORCH_CHECK(num_heads % k.size(1) == 0, num_heads, " heads cannot share ", k.size(1), " of keys and values");
  const Rules rules{num_heads, k.size(1), dim, v_pages.size(3), window, window ? num_sink_tokens : 0,
                    static_cast<float>(soft_cap), sinks ? data<float>(*sinks) : nullptr,
                    bias ? data<float>(*bias) : nullptr, bias ? bias->size(1) : 0};
  Tensor out = torch::stable::new_empty(q, {num_tokens, num_heads, dim});
  std::vector<Tile> tiles;
  int64_t before = -1;
  for (int64_t b = 0; b < num_tokens; b++) {
    const int64_t span = data<int64_t>(spans)[b], position = data<int64_t>(positions)[b], column = position / PAGE;
    STD_TORCH_CHECK(span >= 0 && span < tables.size(0) && position >= 0 && column < tables.size(1),
                    "position ", position, " of span ", span, " is not in the tables");
    STD_TORCH_CHECK(!bias || position < rules.max_distance, "no bias for distance ", position);
    const int32_t* table = data<int32_t>(tables) + span * tables.stride(0);
    STD_TORCH_CHECK(table[column] < k_pages.size(0), "there is no page ", table[column]);
    if (table[column] <= 0) {  // a filling token: nobody's page
      std::fill_n(data<float>(out) + b * num_heads * dim, num_heads * dim, 0.f);
      before = -1;
      continue;
    }
    Tile* tile = tiles.empty() ? nullptr : &tiles.back();
    const bool follows = span == before && tile->count < TILE_TOKENS && position == tile->position + tile->count;
    if (follows)
      tile->count++;
    else
      tiles.push_back({b, 1, position, table});
    before = span;
  }
  if (k_pages.scalar_type() == ScalarType::BFloat16)
    attend_pages(q, k, v, data<uint16_t>(k_pages), data<uint16_t>(v_pages), tiles, rules, data<float>(out));
  else
    attend_pages(q, k, v, data<float>(k_pages), data<float>(v_pages), tiles, rules, data<float>(out));
  return out;
}

// ---- what stands between the products: each row on its own, in one order

constexpr int64_t FEW = 1 << 13;  // numbers that one thread goes through faster than two are woken

// (x - mean) / sqrt(var + eps) * weight + bias, or x / sqrt(mean(x^2) + eps) * weight, of R rows for each token.
void norm_row(const float* x, const float* weight, const float* bias, float eps, bool is_centred, int64_t width,
              float* out) {
  const int64_t whole = width / LANES * LANES;
  float mean = 0;
  if (is_centred) {
    Vec total{};
    for (int64_t d = 0; d < whole; d += LANES) total += load(x + d);
    mean = sum(total);
    for (int64_t d = whole; d < width; d++) mean += x[d];
    mean /= width;
  }
  Vec squares{};
  for (int64_t d = 0; d < whole; d += LANES) {
    const Vec from_mean = load(x + d) - all(mean);
    squares = fma(from_mean, from_mean, squares);
  }
  float square = sum(squares);
  for (int64_t d = whole; d < width; d++) square += (x[d] - mean) * (x[d] - mean);
  const float scale = 1 / std::sqrt(square / width + eps);
  for (int64_t d = 0; d < whole; d += LANES) {
    const Vec normed = (load(x + d) - all(mean)) * all(scale) * load(weight + d);
    store(out + d, bias ? normed + load(bias + d) : normed);
  }
  for (int64_t d = whole; d < width; d++) out[d] = (x[d] - mean) * scale * weight[d] + (bias ? bias[d] : 0);
}

Tensor norm(Tensor x_BRD, Tensor slots_B, Tensor weight_ND, std::optional<Tensor> bias_ND, double eps,
            bool is_centred) {
  expect(x_BRD, ScalarType::Float, 3, "x_BRD");
  const Tensor x = dense_rows(x_BRD), slots = torch::stable::contiguous(slots_B);
  const int64_t num_tokens = x.size(0), rows = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(weight_ND.size(1) == width && slots.size(0) == num_tokens, "another width or number of tokens");
  Tensor out = torch::stable::new_empty(x, {num_tokens, rows, width});
#pragma omp parallel for num_threads(torch::stable::get_num_threads()) if (num_tokens * rows * width > FEW)
  for (int64_t b = 0; b < num_tokens; b++) {
    const int64_t at = data<int64_t>(slots)[b] * width;
    const float* bias = bias_ND ? data<float>(*bias_ND) + at : nullptr;
    for (int64_t r = 0; r < rows; r++)
      norm_row(data<float>(x) + b * x.stride(0) + r * width, data<float>(weight_ND) + at, bias, eps, is_centred, width,
               data<float>(out) + (b * rows + r) * width);
  }
  return out;
}

// The first dimensions of each head turned by the token's position: halves paired, the minus in the table of sines.
Tensor rotate(Tensor x_BHE, Tensor positions_B, Tensor cos_SE, Tensor sin_SE) {
  expect(x_BHE, ScalarType::Float, 3, "x_BHE");
  const Tensor x = dense_rows(x_BHE), positions = torch::stable::contiguous(positions_B);
  const int64_t num_tokens = x.size(0), heads = x.size(1), dim = x.size(2), turned = cos_SE.size(1), half = turned / 2;
  Tensor out = torch::stable::new_empty(x, {num_tokens, heads, dim});
#pragma omp parallel for num_threads(torch::stable::get_num_threads()) if (num_tokens * heads * dim > FEW)
  for (int64_t b = 0; b < num_tokens; b++) {
    const int64_t position = data<int64_t>(positions)[b];
    const float* cos = data<float>(cos_SE) + position * turned;
    const float* sin = data<float>(sin_SE) + position * turned;
    for (int64_t h = 0; h < heads; h++) {
      const float* from = data<float>(x) + b * x.stride(0) + h * dim;
      float* to = data<float>(out) + (b * heads + h) * dim;
      int64_t e = 0;
      for (; e + LANES <= half; e += LANES) {
        const Vec first = load(from + e), second = load(from + half + e);
        store(to + e, fma(second, load(sin + e), first * load(cos + e)));
        store(to + half + e, fma(first, load(sin + half + e), second * load(cos + half + e)));
      }
      for (; e < half; e++) {
        to[e] = from[e] * cos[e] + from[half + e] * sin[e];
        to[half + e] = from[half + e] * cos[half + e] + from[e] * sin[half + e];
      }
      std::copy(from + turned, from + dim, to + turned);
    }
  }
  return out;
}

inline Vec silu(Vec x) { return x / (all(1.f) + exp(-x)); }

// silu of the first half of each row times the second half.
Tensor gate(Tensor x_BF) {
  expect(x_BF, ScalarType::Float, 2, "x_BF");
  const Tensor x = dense_rows(x_BF);
  const int64_t num_tokens = x.size(0), width = x.size(1) / 2;
  Tensor out = torch::stable::new_empty(x, {num_tokens, width});
#pragma omp parallel for num_threads(torch::stable::get_num_threads()) if (num_tokens * width > FEW)
  for (int64_t b = 0; b < num_tokens; b++) {
    const float* from = data<float>(x) + b * x.stride(0);
    float* to = data<float>(out) + b * width;
    int64_t f = 0;
    for (; f + LANES <= width; f += LANES) store(to + f, silu(load(from + f)) * load(from + width + f));
    for (; f < width; f++) to[f] = silu(all(from[f]))[0] * from[width + f];
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(ulm_engine, m) {
  m.def("norm(Tensor x, Tensor slots, Tensor weight, Tensor? bias, float eps, bool is_centred) -> Tensor");
  m.def("rotate(Tensor x, Tensor positions, Tensor cos, Tensor sin) -> Tensor");
  m.def("gate(Tensor x) -> Tensor");
  m.def("pack(Tensor weight, bool is_bfloat16) -> Tensor");
  m.def("linear(Tensor x, Tensor weights, Tensor biases, Tensor segments, int num_out, bool is_bfloat16) -> Tensor");
  m.def("embed(Tensor tokens, Tensor slots, Tensor weights, int num_rows, int width, bool is_bfloat16) -> Tensor");
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor tables, Tensor spans, "
      "Tensor positions, int window, int num_sink_tokens, float soft_cap, Tensor? sinks, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ulm_engine, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("embed", TORCH_BOX(&embed));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("gate", TORCH_BOX(&gate));
}
