// Interpreter of translated PTX. translate.py appends the handlers of INSTRUCTIONS and the table HANDLERS.
//
// A warp runs in lockstep: a handler executes one instruction on 32 lanes. The registers of a warp are one block of
// bytes; an operand is the offset of 32 values in it. A warp runs until a barrier, then the next one does. An epoch is
// the time between two barriers: accesses of two warps within one epoch, one of them a store, are a race.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <sys/mman.h>
#include <vector>

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;
using f32 = float; using pred = u8;

constexpr int LANES = 32;

// Values

template <class To, class From> static inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

static inline f32 flush(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

// Rounds to odd, so that a second rounding, to 16 bits, is as if it were the only one.
static f32 to_odd(double x) {
  f32 y = x;
  if (y != y || y == x) return y;
  const u32 n = bits<u32>(y) - (std::fabs((double)y) > std::fabs(x));
  return bits<f32>(n | 1);
}

struct bf16 {
  u16 n;
  bf16() = default;
  bf16(f32 x) : n(x != x ? 0x7fff : (bits<u32>(x) + 0x7fff + (bits<u32>(x) >> 16 & 1)) >> 16) {}
  bf16(double x) : bf16(to_odd(x)) {}
  operator f32() const { return bits<f32>((u32)n << 16); }
};

struct f16 {
  _Float16 x;
  f16() = default;
  f16(f32 y) : x(y) {}
  f16(double y) : f16(to_odd(y)) {}
  operator f32() const { return x; }
};

struct bf16x2 { bf16 low, high; };
struct f16x2 { f16 low, high; };

template <class T> static inline T minimum(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  return a == b ? (std::signbit((double)a) ? a : b) : a < b ? a : b;
}
template <class T> static inline T maximum(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  return a == b ? (std::signbit((double)a) ? b : a) : a > b ? a : b;
}
template <class T> static inline T quotient(T a, T b) { return b == 0 ? T(-1) : T(-1) < 0 && b == T(-1) ? 0 - a : a / b; }
template <class T> static inline T remainder_of(T a, T b) { return a - quotient(a, b) * b; }

template <class T> static inline T saturated(double x) {  // NaN becomes 0
  const double low = (double)std::numeric_limits<T>::min(), high = (double)std::numeric_limits<T>::max();
  return x != x ? 0 : x <= low ? std::numeric_limits<T>::min() : x >= high ? std::numeric_limits<T>::max() : (T)x;
}

static inline u32 extract(u32 a, u32 start, u32 length) {
  return length == 0 || start > 31 ? 0 : a >> start & (length > 31 ? ~0u : (1u << length) - 1);
}
static inline s32 extract(s32 a, u32 start, u32 length) {
  return length == 0 ? 0 : (s32)((u32)a << (32 - start - length)) >> (32 - length);
}

static inline u32 permute(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 s = selector >> 4 * i & 15, byte = both >> 8 * (s & 7) & 255;
    result |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return result;
}

// State

struct Instruction { int handler, line, guard, negated, first; };  // guard: offset of a predicate or -1
struct Cell { u32 store_epoch, load_epoch, loaders, storing_program, loading_program, storing_warp; };  // of two bytes
struct Memory { u64 begin, end; Cell* cells; };  // a tensor; or shared memory, which begins at 0
struct Copy { u32 to; u64 from; u32 size, valid; int lane; const Instruction* at; };  // a cp.async under way
enum State { RUNNING, WAITING, ENDED };
struct Warp {
  int index, pc;
  State state;
  std::vector<u8> file;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // for each committed group, the number of copies up to its end
  const Instruction* at;
};
using Handler = void (*)(Warp&, const int*);

static struct {
  const Instruction* program;
  const int* operands;
  std::vector<Memory> tensors;
  Memory shared;
  std::vector<u8> shared_bytes;
  u32 epoch, cta;
  char* text;
  int room, problems;
  std::set<std::pair<int, std::string>> told;
} now;
constexpr u32 SEVERAL = ~0u;  // programs

template <class T> static inline T* values(Warp& w, int offset) { return (T*)(w.file.data() + offset); }
static inline bool active(Warp& w, int lane) {
  return w.at->guard < 0 || (values<pred>(w, w.at->guard)[lane] != 0) != w.at->negated;
}

static void report(Warp& w, int lane, const char* what, u64 where) {  // once per instruction and reason
  ++now.problems;
  if (!now.told.insert({w.at->line, what}).second) return;
  const size_t used = strlen(now.text);
  snprintf(now.text + used, now.room - used, "%s, at %#llx (PTX line %d, program %u, warp %d, lane %d)\n", what,
           (unsigned long long)where, w.at->line, now.cta, w.index, lane);
}

static bool uniform(Warp& w) {
  int count = 0;
  for (int l = 0; l < LANES; ++l) count += active(w, l);
  if (count != 0 && count != LANES) report(w, 0, "the lanes of a warp part at a branch", count);
  return count != 0;
}

// Memory

static Memory* find(u64 address, u32 size) {
  static size_t last = 0;
  for (size_t i = 0; i <= now.tensors.size(); ++i) {
    const size_t index = i == 0 ? last : i - 1;
    if (index >= now.tensors.size()) continue;
    Memory& m = now.tensors[index];
    if (address >= m.begin && address + size <= m.end) return last = index, &m;
  }
  return nullptr;
}

// Records an access and reports what is wrong with it. data: the bytes to be stored, if they are known; storing what
// is there already is no race. False if the access cannot be made.
static bool check(Warp& w, int lane, bool global, bool store, u64 address, u32 size, const u8* data) {
  if (address % size) return report(w, lane, global ? "misaligned global access" : "misaligned shared access", address), false;
  Memory* m = global ? find(address, size) : address + size <= now.shared.end ? &now.shared : nullptr;
  if (!m) {
    report(w, lane, global ? (store ? "store outside of every tensor" : "load outside of every tensor")
                           : "shared access out of bounds", address);
    return false;
  }
  const u8* bytes = global ? (const u8*)address : now.shared_bytes.data() + address;
  const u32 me = 1u << w.index;
  for (u32 i = 0; i < size; i += 2) {
    Cell& c = m->cells[(address - m->begin + i) / 2];
    if (global) {
      if (c.storing_program && c.storing_program != now.cta + 1)
        return report(w, lane, store ? "two programs store one element" : "load of what another program stores", address + i), true;
      if (store && c.loading_program && c.loading_program != now.cta + 1)
        report(w, lane, "store of what another program loads", address + i);
      if (store) c.storing_program = now.cta + 1;
      else c.loading_program = c.loading_program && c.loading_program != now.cta + 1 ? SEVERAL : now.cta + 1;
    }
    const bool foreign = c.store_epoch == now.epoch && c.storing_warp != (u32)w.index;
    if (store) {
      const bool same = data && !memcmp(bytes + i, data + i, std::min(2u, size - i));
      if (foreign && !same) report(w, lane, global ? "global race: two warps store" : "shared race: two warps store", address + i);
      if (c.load_epoch == now.epoch && (c.loaders & ~me) && !same)
        report(w, lane, global ? "global race: store after another warp's load" : "shared race: store after another warp's load", address + i);
      c.store_epoch = now.epoch;
      c.storing_warp = w.index;
    } else {
      if (foreign) report(w, lane, global ? "global race: load after another warp's store" : "shared race: load after another warp's store", address + i);
      if (c.load_epoch != now.epoch) c.loaders = 0;
      c.load_epoch = now.epoch;
      c.loaders |= me;
    }
  }
  return true;
}

static void load_bytes(Warp& w, int lane, bool global, u64 address, void* to, u32 size) {
  if (!check(w, lane, global, false, address, size, nullptr)) memset(to, 0xff, size);
  else memcpy(to, global ? (const u8*)address : now.shared_bytes.data() + address, size);
}
static void store_bytes(Warp& w, int lane, bool global, u64 address, const void* from, u32 size) {
  if (check(w, lane, global, true, address, size, (const u8*)from))
    memcpy(global ? (u8*)address : now.shared_bytes.data() + address, from, size);
}
static inline u64 address_of(Warp& w, int lane, bool global, int base, int displacement) {
  return global ? values<u64>(w, base)[lane] + displacement : values<u32>(w, base)[lane] + (u32)displacement;
}

// o: global, base, displacement, bytes per element, count, then an offset and a register's size for each element
static void load(Warp& w, const int* o) {
  for (int l = 0; l < LANES; ++l) {
    if (!active(w, l)) continue;
    u8 data[16];
    load_bytes(w, l, o[0], address_of(w, l, o[0], o[1], o[2]), data, o[3] * o[4]);
    for (int i = 0; i < o[4]; ++i) {
      u8* to = values<u8>(w, o[5 + 2 * i]) + l * o[6 + 2 * i];
      memset(to, 0, o[6 + 2 * i]);
      memcpy(to, data + i * o[3], o[3]);
    }
  }
}
static void store(Warp& w, const int* o) {
  for (int l = 0; l < LANES; ++l) {
    if (!active(w, l)) continue;
    u8 data[16];
    for (int i = 0; i < o[4]; ++i) memcpy(data + i * o[3], values<u8>(w, o[5 + 2 * i]) + l * o[6 + 2 * i], o[3]);
    store_bytes(w, l, o[0], address_of(w, l, o[0], o[1], o[2]), data, o[3] * o[4]);
  }
}

// cp.async lands as late as it may, at the wait that covers it. Until then its destination is NaN.
// o: shared base, displacement, global base, displacement, size, number of bytes that are read (others are 0)
static void copy_async(Warp& w, const int* o) {
  for (int l = 0; l < LANES; ++l) {
    if (!active(w, l)) continue;
    const u32 to = address_of(w, l, false, o[0], o[1]), size = o[4], valid = values<u32>(w, o[5])[l];
    if (valid > size) report(w, l, "cp.async reads more than it stores", valid);
    if (!check(w, l, false, true, to, size, nullptr)) continue;
    memset(now.shared_bytes.data() + to, 0xff, size);
    w.copies.push_back({to, address_of(w, l, true, o[2], o[3]), size, std::min(valid, size), l, w.at});
  }
}
static void commit_group(Warp& w, const int*) { w.groups.push_back(w.copies.size()); }
static void wait_group(Warp& w, const int* o) {  // o: number of groups that may stay under way
  if ((int)w.groups.size() <= o[0]) return;
  const size_t done = w.groups.size() - o[0], end = w.groups[done - 1];
  for (size_t i = 0; i < end; ++i) {
    const Copy& c = w.copies[i];
    const Instruction* wait = w.at;
    u8 data[16] = {};
    w.at = c.at;
    if (c.valid) load_bytes(w, c.lane, true, c.from, data, c.valid);
    store_bytes(w, c.lane, false, c.to, data, c.size);
    w.at = wait;
  }
  w.copies.erase(w.copies.begin(), w.copies.begin() + end);
  w.groups.erase(w.groups.begin(), w.groups.begin() + done);
  for (size_t& group : w.groups) group -= end;
}

// o: number of 8 x 8 matrices, transposed, base, displacement, registers
static void load_matrix(Warp& w, const int* o) {
  u32 result[4][LANES];
  for (int m = 0; m < o[0]; ++m) {
    u16 tile[8][8];
    for (int i = 0; i < 8; ++i) load_bytes(w, m * 8 + i, false, address_of(w, m * 8 + i, false, o[2], o[3]), tile[i], 16);
    for (int l = 0; l < LANES; ++l) {
      const int row = l / 4, col = l % 4 * 2;
      result[m][l] = o[1] ? tile[col][row] | (u32)tile[col + 1][row] << 16 : tile[row][col] | (u32)tile[row][col + 1] << 16;
    }
  }
  for (int m = 0; m < o[0]; ++m) memcpy(values<u32>(w, o[4 + m]), result[m], sizeof result[m]);
}
static void store_matrix(Warp& w, const int* o) {
  for (int m = 0; m < o[0]; ++m) {
    u16 tile[8][8];
    for (int l = 0; l < LANES; ++l) {
      const int row = l / 4, col = l % 4 * 2;
      const u32 both = values<u32>(w, o[4 + m])[l];
      (o[1] ? tile[col][row] : tile[row][col]) = both;
      (o[1] ? tile[col + 1][row] : tile[row][col + 1]) = both >> 16;
    }
    for (int i = 0; i < 8; ++i) store_bytes(w, m * 8 + i, false, address_of(w, m * 8 + i, false, o[2], o[3]), tile[i], 16);
  }
}

// Lanes and control

// o: mode (up, down, bfly, idx), destination, source, lane operand, clamp, predicate or -1
static void shuffle(Warp& w, const int* o) {
  u32 result[LANES];
  const u32 *source = values<u32>(w, o[2]), *operand = values<u32>(w, o[3]), *clamp = values<u32>(w, o[4]);
  for (int l = 0; l < LANES; ++l) {
    const int b = operand[l] & 31, c = clamp[l] & 31, segment = clamp[l] >> 8 & 31, last = (l & segment) | (c & ~segment);
    const int from = o[0] == 0 ? l - b : o[0] == 1 ? l + b : o[0] == 2 ? l ^ b : (l & segment) | (b & ~segment);
    const bool inside = o[0] == 0 ? from >= last : from <= last;
    result[l] = source[inside ? from : l];
    if (o[5] >= 0) values<pred>(w, o[5])[l] = inside;
  }
  memcpy(values<u32>(w, o[1]), result, sizeof result);
}
static void branch(Warp& w, const int* o) { if (uniform(w)) w.pc = o[0]; }
static void barrier(Warp& w, const int*) { w.state = WAITING; }
static void leave(Warp& w, const int*) { if (uniform(w)) w.state = ENDED; }

// Tensor cores: sums are float32 in order of k. A kind is 0 for f16, 1 for bf16 and 2 for tf32.

struct Tile { f32 a[16][16], b[16][256], c[16][256]; };
static Tile tile;

static inline f32 element(int kind, u32 x) {
  return kind == 0 ? (f32)bits<f16>((u16)x) : kind == 1 ? (f32)bits<bf16>((u16)x) : bits<f32>(x & 0xffffe000u);
}
static inline int depth(int kind) { return kind == 2 ? 8 : 16; }

static void read_a(Warp& w, int kind, const int* registers) {
  for (int r = 0; r < 4; ++r)
    for (int l = 0; l < LANES; ++l) {
      const u32 x = values<u32>(w, registers[r])[l];
      const int row = l / 4 + r % 2 * 8, t = l % 4;
      if (kind == 2) tile.a[row][t + r / 2 * 4] = element(kind, x);
      else for (int h = 0; h < 2; ++h) tile.a[row][2 * t + r / 2 * 8 + h] = element(kind, x >> 16 * h);
    }
}
static void accumulate(Warp& w, int kind, int n, const int* c, bool keep, f32 sign, const int* d) {
  for (int r = 0; r < n / 2; ++r)
    for (int l = 0; l < LANES; ++l)
      tile.c[l / 4 + r % 4 / 2 * 8][r / 4 * 8 + l % 4 * 2 + r % 2] = keep ? values<f32>(w, c[r])[l] : 0.f;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < depth(kind); ++k) {
      const f32 a = sign * tile.a[i][k];
      for (int j = 0; j < n; ++j) tile.c[i][j] += a * tile.b[k][j];
    }
  for (int r = 0; r < n / 2; ++r)
    for (int l = 0; l < LANES; ++l)
      values<f32>(w, d[r])[l] = tile.c[l / 4 + r % 4 / 2 * 8][r / 4 * 8 + l % 4 * 2 + r % 2];
}
// o: kind, 4 registers of a, 2 of b, 4 of c, 4 of d
static void mma(Warp& w, const int* o) {
  read_a(w, o[0], o + 1);
  for (int r = 0; r < 2; ++r)
    for (int l = 0; l < LANES; ++l) {
      const u32 x = values<u32>(w, o[5 + r])[l];
      if (o[0] == 2) tile.b[l % 4 + r * 4][l / 4] = element(2, x);
      else for (int h = 0; h < 2; ++h) tile.b[l % 4 * 2 + r * 8 + h][l / 4] = element(o[0], x >> 16 * h);
    }
  accumulate(w, o[0], 8, o + 7, true, 1.f, o + 11);
}

// Reads elements of a wgmma operand in shared memory, 16 bytes at once, and calls put(row, k, value).
template <class Put>
static void read_operand(Warp& w, int kind, u64 descriptor, int first, int rows, bool transposed, Put put) {
  const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = descriptor >> 62, width = mode ? 256 >> mode : 16, mask = mode ? (16 >> mode) - 1 : 0;
  const int size = kind == 2 ? 4 : 2, chunk = 16 / size, per_width = width / size;
  for (int row = first; row < first + rows; row += transposed ? chunk : 1)
    for (int k = 0; k < depth(kind); k += transposed ? 1 : chunk) {
      u32 address = transposed ? start + row / per_width * leading + k / 8 * stride + k % 8 * width + row % per_width * size
                               : start + row / 8 * stride + row % 8 * width + (mode ? k * size : k / per_width * leading + k % per_width * size);
      address ^= (address >> 7 & mask) << 4;
      u8 data[16];
      load_bytes(w, 0, false, address, data, 16);
      for (int i = 0; i < chunk; ++i) {
        u32 x = 0;
        memcpy(&x, data + i * size, size);
        put(transposed ? row + i : row, transposed ? k : k + i, element(kind, x));
      }
    }
}
// A warp computes its 16 of the 64 rows, when the instruction is issued.
// o: kind, n, predicate that keeps d, signs of a and b, a and b transposed, a in registers, 4 of a, b, registers of d
static void wgmma(Warp& w, const int* o) {
  const int first = w.index % 4 * 16;
  if (o[7]) read_a(w, o[0], o + 8);
  else read_operand(w, o[0], values<u64>(w, o[8])[0], first, 16, o[5], [&](int row, int k, f32 x) { tile.a[row - first][k] = x; });
  read_operand(w, o[0], values<u64>(w, o[12])[0], 0, o[1], o[6], [](int row, int k, f32 x) { tile.b[k][row] = x; });
  accumulate(w, o[0], o[1], o + 13, values<pred>(w, o[2])[0], (f32)(o[3] * o[4]), o + 13);
}

// Launch

static Cell* cells(u64 bytes) {  // pages are taken when touched
  void* p = mmap(nullptr, (bytes / 2 + 1) * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (Cell*)p;
}

extern const Handler HANDLERS[];

static void run_program(std::vector<Warp>& warps, const int* grid, bool is_shuffled, std::mt19937& random) {
  const u32 x = grid[0], y = grid[1];
  const u32 places[] = {now.cta % x, now.cta / x % y, now.cta / x / y, x, y, (u32)grid[2]};
  for (Warp& w : warps)
    for (int l = 0; l < LANES; ++l) {  // the special registers, in the order of SPECIAL in translate.py
      values<u32>(w, 0)[l] = w.index * LANES + l;
      values<u32>(w, 128)[l] = l;
      for (int i = 0; i < 6; ++i) values<u32>(w, 128 * (2 + i))[l] = places[i];
    }
  size_t ended = 0;
  std::vector<Warp*> order;
  for (Warp& w : warps) order.push_back(&w);
  while (ended < warps.size()) {
    ++now.epoch;
    if (is_shuffled) std::shuffle(order.begin(), order.end(), random);
    for (Warp* w : order) {
      if (w->state == WAITING) w->state = RUNNING;
      while (w->state == RUNNING) {
        w->at = &now.program[w->pc++];
        HANDLERS[w->at->handler](*w, now.operands + w->at->first);
      }
    }
    const size_t before = ended;
    ended = std::count_if(warps.begin(), warps.end(), [](const Warp& w) { return w.state == ENDED; });
    if (before != ended && ended < warps.size()) report(*order[0], 0, "some warps ended while others wait at a barrier", ended);
  }
  for (Warp& w : warps)
    if (!w.copies.empty()) report(w, 0, "cp.async that nothing waits for", w.copies[0].to);
}

// Runs a launch and returns the number of problems. image: registers and constants at the start of each warp.
// order: 0 runs programs and warps in their order, any other number is the seed of a shuffle.
extern "C" int run(const Instruction* program, const int* operands, const u8* image, int image_bytes, const u64* tensors,
                   int count, const int* grid, int num_warps, int shared_bytes, int order, char* text, int room) {
  now.program = program; now.operands = operands; now.text = text; now.room = room; now.problems = 0; now.epoch = 0; now.told.clear();
  now.tensors.clear();
  for (int i = 0; i < count; ++i) now.tensors.push_back({tensors[2 * i], tensors[2 * i + 1], cells(tensors[2 * i + 1] - tensors[2 * i])});
  now.shared = {0, (u64)shared_bytes, cells(shared_bytes)};
  std::mt19937 random(order);
  std::vector<u32> programs(grid[0] * grid[1] * grid[2]);
  for (size_t i = 0; i < programs.size(); ++i) programs[i] = i;
  if (order) std::shuffle(programs.begin(), programs.end(), random);
  std::vector<Warp> warps(num_warps);
  for (u32 index : programs) {
    now.cta = index;
    now.shared_bytes.assign(shared_bytes, 0xff);
    for (int i = 0; i < num_warps; ++i) warps[i] = {i, 0, RUNNING, {image, image + image_bytes}, {}, {}, nullptr};
    run_program(warps, grid, order != 0, random);
  }
  now.tensors.push_back(now.shared);
  for (Memory& m : now.tensors) munmap(m.cells, ((m.end - m.begin) / 2 + 1) * sizeof(Cell));
  return now.problems;
}
