// Two operations of decoding on a CPU: a few rows times a matrix, and the attention of one token.
//
// A step of decoding reads every weight for a few rows. Libraries tile such products for many rows
// and keep weights in 32 bits. Here a matrix lies in the order in which it is read, and may be held
// in fewer bits: it is widened on the way to the registers, and all sums are of 32-bit floats. A
// row's sums are taken in the same order whoever shares the batch, so its result is the same to the
// last bit. Vectors are GCC's, for AVX2 and AVX-512.
//
// The functions named aoti_torch_cpu_* are what compiled programs call (step_program.py).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include <immintrin.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

constexpr int COLUMNS = 32;     // outputs whose weights lie side by side
#ifdef __AVX512F__
constexpr int LANES = 16;       // floats in a vector
constexpr int ROWS = 12;        // most that are multiplied at once: 24 of 32 registers hold sums
#else
constexpr int LANES = 8;
constexpr int ROWS = 3;         // 12 of 16
#endif
constexpr int VECTORS = COLUMNS / LANES;
constexpr int AHEAD = 2048;     // weights from what is read to what is fetched
constexpr int NEXT = 16;        // positions from what is read to what is fetched
constexpr float HIDDEN = -1e30f;  // score of what a query does not see

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

struct BFloat16 {
  uint16_t bits;  // the upper half of a float
};

inline Floats load(const float* from) {
  Floats floats;
  memcpy(&floats, from, sizeof floats);
  return floats;
}

inline Floats load(const int8_t* from) {  // which GCC 12 does not find by itself
#ifdef __AVX512F__
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#endif
}

// The weights of COLUMNS outputs for one input.
template <class Weight>
inline void load_columns(const Weight* from, Floats (&to)[VECTORS]) {
  for (int v = 0; v < VECTORS; v++) to[v] = load(from + v * LANES);
}

// Those of 16 bits lie in pairs, the one half of the columns below the other: each half is one
// operation away from being floats.
inline void load_columns(const BFloat16* from, Floats (&to)[VECTORS]) {
  for (int v = 0; v < VECTORS / 2; v++) {
    Words pairs;
    memcpy(&pairs, from + 2 * v * LANES, sizeof pairs);
    const Words low = pairs << 16, high = pairs & 0xffff0000u;
    memcpy(&to[v], &low, sizeof low);
    memcpy(&to[v + VECTORS / 2], &high, sizeof high);
  }
}

// R rows of x (.., in) times one block of outputs, whose weights follow one another by input.
template <int R, class Weight>
void tile(const float* x, const Weight* w, float* y, int64_t in, int64_t out, int64_t columns) {
  Floats sums[R][VECTORS] = {};
  for (int64_t i = 0; i < in; i++, w += COLUMNS) {
    for (size_t byte = 0; byte < COLUMNS * sizeof(Weight); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(w + AHEAD) + byte);
    Floats weights[VECTORS];
    load_columns(w, weights);
    for (int r = 0; r < R; r++)  // each number of x is in a register for a moment only
      for (int v = 0; v < VECTORS; v++) sums[r][v] += x[r * in + i] * weights[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < VECTORS; v++) {
      float* to = y + r * out + v * LANES;
      if (columns >= (v + 1) * LANES) {
        memcpy(to, &sums[r][v], sizeof(Floats));
      } else {  // the last block's; a copy, since what has its address taken leaves the registers
        const Floats sum = sums[r][v];
        for (int i = 0; i < LANES && v * LANES + i < columns; i++) to[i] = sum[i];
      }
    }
}

template <class Weight, int... Before>
auto tile_of(int rows, std::integer_sequence<int, Before...>) {
  static constexpr decltype(&tile<1, Weight>) tiles[] = {tile<Before + 1, Weight>...};
  return tiles[rows - 1];
}

template <class Weight>
void multiply(const float* x, const void* packed, float* y, int64_t rows, int64_t in, int64_t out) {
  const int64_t blocks = (out + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for
  for (int64_t block = 0; block < blocks; block++) {
    const Weight* w = static_cast<const Weight*>(packed) + block * in * COLUMNS;
    const int64_t column = block * COLUMNS, columns = std::min<int64_t>(COLUMNS, out - column);
    for (int64_t row = 0; row < rows; row += ROWS) {  // the first has most to do while it waits
      const int height = std::min<int64_t>(ROWS, rows - row);
      const auto compute = tile_of<Weight>(height, std::make_integer_sequence<int, ROWS>());
      compute(x + row * in, w, y + row * out + column, in, out, columns);
    }
  }
}

// Sums of products of `width` numbers, V vectors of them at a time.
template <int V>
inline float dot(const float* a, const float* b, int64_t width) {
  Floats sums[V] = {};
  for (int64_t e = 0; e < width; e += V * LANES)
    for (int v = 0; v < V; v++) sums[v] += load(a + e + v * LANES) * load(b + e + v * LANES);
  for (int v = 1; v < V; v++) sums[0] += sums[v];
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += sums[0][i];
  return sum;
}

// What one query sees of one head's keys and values: their mean by the softmax of the scores.
// `weights`: room for a number of each position.
template <int V>
void attend(const float* q, const float* k, const float* v, const bool* visible, float* y,
            int64_t width, int64_t seen, int64_t k_stride, int64_t v_stride, float* weights) {
  int64_t first = 0, end = seen;  // what is outside need not be read
  while (first < end && !visible[first]) first++;
  while (end > first && !visible[end - 1]) end--;
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  float most = HIDDEN, sum = 0;
  for (int64_t s = first; s < end; s++) {
    const int64_t then = s + NEXT;  // behind the last keys come the first values
    const float* later =
        then < end ? k + then * k_stride : v + std::min(first + then - end, end - 1) * v_stride;
    for (int64_t e = 0; e < width; e += LANES) __builtin_prefetch(later + e);
    const float score = dot<V>(q, k + s * k_stride, width) * scale;
    weights[s] = visible[s] ? score : HIDDEN;
    most = std::max(most, weights[s]);
  }
  for (int64_t s = first; s < end; s++) sum += weights[s] = std::exp(weights[s] - most);
  for (int64_t from = 0; from < width; from += V * LANES) {
    Floats sums[V] = {};
    for (int64_t s = first; s < end; s++) {
      const float* value = v + s * v_stride + from;
      const float* later = v + std::min(s + NEXT, end - 1) * v_stride + from;
      for (int i = 0; i < V; i++) __builtin_prefetch(later + i * LANES);
      for (int i = 0; i < V; i++) sums[i] += weights[s] * load(value + i * LANES);
    }
    for (int i = 0; i < V; i++) {
      const Floats mean = sums[i] / sum;
      memcpy(y + from + i * LANES, &mean, sizeof mean);
    }
  }
}

}  // namespace

// (rows, in) floats times a packed matrix of `bits` bits a weight -> (rows, out).
extern "C" void nanochat_packed_linear(const float* x, const void* packed, float* y, int64_t rows,
                                       int64_t in, int64_t out, int64_t bits) {
  if (bits == 8)
    multiply<int8_t>(x, packed, y, rows, in, out);
  else if (bits == 16)
    multiply<BFloat16>(x, packed, y, rows, in, out);
  else
    multiply<float>(x, packed, y, rows, in, out);
}

// sizes: B, H, K, E, S; strides: those of keys by row, head, position, then those of values.
extern "C" void nanochat_one_query(const float* q, const float* k, const float* v,
                                   const bool* visible, float* y, const int64_t* sizes,
                                   const int64_t* strides) {
  const int64_t B = sizes[0], H = sizes[1], K = sizes[2], E = sizes[3], S = sizes[4];
  const auto mean = E % 64 ? attend<1> : attend<64 / LANES>;
#pragma omp parallel
  {
    std::vector<float> weights(S);
#pragma omp for collapse(2) nowait
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++) {
        const int64_t of = h / (H / K), at = (b * H + h) * E;
        mean(q + at, k + b * strides[0] + of * strides[1], v + b * strides[3] + of * strides[4],
               visible + b * S, y + at, E, S, strides[2], strides[5], weights.data());
      }
  }
}

// ---- for compiled programs: tensors by their handles -------------------------------------------

namespace {

template <class T>
T* data(AtenTensorHandle tensor) {
  void* pointer = nullptr;
  aoti_torch_get_data_ptr(tensor, &pointer);
  return static_cast<T*>(pointer);
}

const int64_t* sizes(AtenTensorHandle tensor) {
  int64_t* found = nullptr;
  aoti_torch_get_sizes(tensor, &found);
  return found;
}

const int64_t* strides(AtenTensorHandle tensor) {
  int64_t* found = nullptr;
  aoti_torch_get_strides(tensor, &found);
  return found;
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle x, AtenTensorHandle packed,
                                                       int64_t out, int64_t bits,
                                                       AtenTensorHandle* y) {
  const int64_t rows = sizes(x)[0], in = sizes(x)[1];
  const int64_t size[] = {rows, out}, stride[] = {out, 1};
  const AOTITorchError error = aoti_torch_empty_strided(
      2, size, stride, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, y);
  if (error) return error;
  nanochat_packed_linear(data<float>(x), data<void>(packed), data<float>(*y), rows, in, out, bits);
  return error;
}

extern "C" AOTITorchError aoti_torch_cpu_one_query(AtenTensorHandle q, AtenTensorHandle k,
                                                   AtenTensorHandle v, AtenTensorHandle visible,
                                                   AtenTensorHandle* y) {
  const int64_t *query = sizes(q), *held = sizes(k), *ks = strides(k), *vs = strides(v);
  const int64_t B = query[0], width = query[2] * query[3];
  const int64_t size[] = {B, 1, width}, stride[] = {width, width, 1};
  const AOTITorchError error = aoti_torch_empty_strided(
      3, size, stride, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, y);
  if (error) return error;
  const int64_t of[] = {B, query[2], held[1], query[3], held[2]};
  const int64_t steps[] = {ks[0], ks[1], ks[2], vs[0], vs[1], vs[2]};
  nanochat_one_query(data<float>(q), data<float>(k), data<float>(v), data<bool>(visible),
                     data<float>(*y), of, steps);
  return error;
}
