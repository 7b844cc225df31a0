// Interpreter of translated PTX. translate.py appends the handlers of its tables and HANDLERS, the list of all.
//
// A warp runs in lockstep: a handler executes one instruction on 32 lanes. A warp's registers are one block of bytes;
// an operand is the offset of 32 values in it. A warp runs until a barrier, then the next one does. An epoch is the
// time between two barriers: two warps that access one cell in an epoch, one of them with a store, are a race.
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
using s16 = int16_t; using s32 = int32_t; using s64 = int64_t; using f32 = float; using pred = u8;
constexpr int LANES = 32;

template <class To, class From> static inline To bits(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
static inline f32 flush(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
static f32 to_odd(double x) {  // rounds such that a second rounding, to 16 bits, is as if it were the only one
  const f32 y = x;
  return y != y || y == x ? y : bits<f32>((bits<u32>(y) - (std::fabs((double)y) > std::fabs(x))) | 1);
}
struct bf16 {
  u16 n; bf16() = default;
  bf16(f32 x) : n(x != x ? 0x7fff : (bits<u32>(x) + 0x7fff + (bits<u32>(x) >> 16 & 1)) >> 16) {}
  bf16(double x) : bf16(to_odd(x)) {}
  operator f32() const { return bits<f32>((u32)n << 16); }
};
struct f16 {
  _Float16 x; f16() = default;
  f16(f32 y) : x(y) {}
  f16(double y) : f16(to_odd(y)) {}
  operator f32() const { return x; }
};
struct bf16x2 { bf16 low, high; }; struct f16x2 { f16 low, high; };

template <class T> static inline T minimum(T a, T b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T> static inline T maximum(T a, T b) { return -minimum(-a, -b); }
template <class T> static inline T quotient(T a, T b) { return b == 0 ? -1 : T(-1) < 0 && b == T(-1) ? -a : a / b; }
template <class T> static inline T saturated(double x) {  // NaN becomes 0
  using limits = std::numeric_limits<T>;
  return x != x ? 0 : x <= (double)limits::min() ? limits::min() : x >= (double)limits::max() ? limits::max() : (T)x;
}
template <class T> static inline T extract(T a, u32 start, u32 length) {
  length = start > 31 ? 0 : std::min(length, 32 - start);
  return length == 0 ? 0 : (T)((u32)a << (32 - start - length)) >> (32 - length);
}
static inline u32 permute(u32 a, u32 b, u32 selector) {
  u32 result = 0;
  for (int i = 0; i < 32; i += 8, selector >>= 4) {  // four bits choose a byte, or with the highest of them its sign
    const u8 byte = ((u64)b << 32 | a) >> 8 * (selector & 7);
    result |= (u32)(selector & 8 ? (byte & 128 ? 255 : 0) : byte) << i;
  }
  return result;
}

struct Instruction { int handler, line, guard, negated, first; };  // guard: offset of a predicate or -1
struct Cell { u32 store_epoch, load_epoch, loaders, storing_program, loading_program, storing_warp; };  // of a byte
struct Memory { u64 begin, end; Cell* cells; };  // a tensor; or shared memory, which begins at 0
struct Copy { u32 to; u64 from; u32 size, valid; int lane; const Instruction* at; };  // a cp.async under way
enum State { RUNNING, WAITING, ENDED };
struct Warp {
  int index, pc;
  State state;
  std::vector<u8> file;  // registers
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // for each committed group, the number of copies up to its end
  const Instruction* at;
};
static struct {
  const Instruction* program;
  const int* operands;
  std::vector<Memory> tensors;
  Memory shared;
  std::vector<u8> shared_bytes;
  u32 epoch, cta;
  int problems;
  std::string text;
  std::set<std::pair<int, std::string>> told;
} now;
template <class T> static inline T* values(Warp& w, int offset) { return (T*)(w.file.data() + offset); }
static inline bool active(Warp& w, int lane) {
  return w.at->guard < 0 || (values<pred>(w, w.at->guard)[lane] != 0) != w.at->negated;
}
// Reports a reason once per instruction.
static void report(Warp& w, int lane, const char* space, const char* what, u64 where) {
  ++now.problems;
  if (!now.told.insert({w.at->line, what}).second) return;
  char line[200];
  snprintf(line, sizeof line, "%s%s, at %#llx (PTX line %d, program %u, warp %d, lane %d)\n", space, what,
           (unsigned long long)where, w.at->line, now.cta, w.index, lane);
  now.text += line;
}

static Memory* find(bool global, u64 address, u32 size) {
  const auto holds = [&](const Memory& m) { return address >= m.begin && address + size <= m.end; };
  if (!global) return holds(now.shared) ? &now.shared : nullptr;
  for (Memory& m : now.tensors)
    if (holds(m)) return &m;
  return nullptr;
}
static inline u8* pointer(bool global, u64 address) {
  return global ? (u8*)address : now.shared_bytes.data() + address;
}

// Records an access and reports what is wrong with it. data: what a store brings, if known; to store what is there
// already is no race. False if the access cannot be made.
static bool check(Warp& w, int lane, bool global, bool store, u64 address, u32 size, const u8* data) {
  const char* space = global ? "global" : "shared";
  Memory* m = find(global, address, size);
  if (address % size || !m) {
    report(w, lane, space, m ? " access misaligned" : store ? " store out of bounds" : " load out of bounds", address);
    return false;
  }
  const u32 me = 1u << w.index, program = now.cta + 1;  // 0 is none
  for (u32 i = 0; i < size; ++i) {
    Cell& c = m->cells[address - m->begin + i];
    const u64 where = address + i;
    if (global && c.storing_program && c.storing_program != program) {
      report(w, lane, space, store ? ": two programs store" : ": load of what another program stores", where);
      return true;
    }
    const bool foreign = c.store_epoch == now.epoch && c.storing_warp != (u32)w.index;
    if (store) {
      const bool same = data && *pointer(global, where) == data[i];
      if (global && c.loading_program && c.loading_program != program)
        report(w, lane, space, ": store of what another program loads", where);
      if (foreign && !same) report(w, lane, space, " race: two warps store", where);
      if (c.load_epoch == now.epoch && (c.loaders & ~me) && !same)
        report(w, lane, space, " race: store after another warp's load", where);
      c.storing_program = program;
      c.store_epoch = now.epoch;
      c.storing_warp = w.index;
    } else {
      if (foreign) report(w, lane, space, " race: load after another warp's store", where);
      c.loading_program = c.loading_program && c.loading_program != program ? ~0u : program;  // ~0 is several
      c.loaders = (c.load_epoch == now.epoch ? c.loaders : 0) | me;
      c.load_epoch = now.epoch;
    }
  }
  return true;
}
static void load_bytes(Warp& w, int lane, bool global, u64 address, void* to, u32 size) {
  if (check(w, lane, global, false, address, size, nullptr)) memcpy(to, pointer(global, address), size);
  else memset(to, 0xff, size);
}
static void store_bytes(Warp& w, int lane, bool global, u64 address, const void* from, u32 size) {
  if (check(w, lane, global, true, address, size, (const u8*)from)) memcpy(pointer(global, address), from, size);
}
static inline u64 address_of(Warp& w, int lane, bool global, int base, int displacement) {
  return global ? values<u64>(w, base)[lane] + displacement : values<u32>(w, base)[lane] + (u32)displacement;
}

// o: global, base, displacement, bytes per element, count, then offset and size of a register for each element
template <bool IS_STORE> static void move(Warp& w, const int* o) {
  for (int l = 0; l < LANES; ++l) {
    if (!active(w, l)) continue;
    const u64 address = address_of(w, l, o[0], o[1], o[2]);
    u8 data[16];
    if (!IS_STORE) load_bytes(w, l, o[0], address, data, o[3] * o[4]);
    for (int i = 0; i < o[4]; ++i) {
      u8 *element = data + i * o[3], *lane = values<u8>(w, o[5 + 2 * i]) + l * o[6 + 2 * i];
      if (!IS_STORE) memset(lane, 0, o[6 + 2 * i]);
      memcpy(IS_STORE ? element : lane, IS_STORE ? lane : element, o[3]);
    }
    if (IS_STORE) store_bytes(w, l, o[0], address, data, o[3] * o[4]);
  }
}
// A cp.async lands as late as it may, at the wait that covers it. Until then its destination is NaN.
// o: shared base, displacement, global base, displacement, size, number of bytes that are read (others are 0)
static void copy_async(Warp& w, const int* o) {
  for (int l = 0; l < LANES; ++l) {
    if (!active(w, l)) continue;
    const u32 to = address_of(w, l, false, o[0], o[1]), size = o[4], valid = values<u32>(w, o[5])[l];
    if (!check(w, l, false, true, to, size, nullptr)) continue;
    memset(pointer(false, to), 0xff, size);
    w.copies.push_back({to, address_of(w, l, true, o[2], o[3]), size, std::min(valid, size), l, w.at});
  }
}
static void commit_group(Warp& w, const int*) { w.groups.push_back(w.copies.size()); }
static void wait_group(Warp& w, const int* o) {  // o: number of groups that may stay under way
  if ((int)w.groups.size() <= o[0]) return;
  const size_t done = w.groups.size() - o[0], end = w.groups[done - 1];
  const Instruction* wait = w.at;
  for (size_t i = 0; i < end; ++i) {
    const Copy& c = w.copies[i];
    u8 data[16] = {};
    w.at = c.at;
    if (c.valid) load_bytes(w, c.lane, true, c.from, data, c.valid);
    store_bytes(w, c.lane, false, c.to, data, c.size);
  }
  w.at = wait;
  w.copies.erase(w.copies.begin(), w.copies.begin() + end);
  w.groups.erase(w.groups.begin(), w.groups.begin() + done);
  for (size_t& group : w.groups) group -= end;
}
// 8 x 8 matrices of 16-bit elements; lane 8 m + i has the address of row i of matrix m.
// o: number of matrices, transposed, base, displacement, registers
template <bool IS_STORE> static void move_matrix(Warp& w, const int* o) {
  u16 tiles[4][8][8];
  const auto rows = [&](auto move) {
    for (int l = 0; l < 8 * o[0]; ++l) move(w, l, false, address_of(w, l, false, o[2], o[3]), tiles[l / 8][l % 8], 16);
  };
  if (!IS_STORE) rows(load_bytes);
  for (int m = 0; m < o[0]; ++m)
    for (int l = 0; l < LANES; ++l)
      for (int h = 0; h < 2; ++h) {
        const int row = l / 4, col = l % 4 * 2 + h;
        u16 &element = o[1] ? tiles[m][col][row] : tiles[m][row][col], &half = values<u16>(w, o[4 + m])[2 * l + h];
        if (IS_STORE) element = half; else half = element;
      }
  if (IS_STORE) rows(store_bytes);
}
// o: mode (up, down, bfly, idx), destination, source, lane operand, clamp, predicate or -1
static void shuffle(Warp& w, const int* o) {
  u32 result[LANES];
  for (int l = 0; l < LANES; ++l) {
    const int b = values<u32>(w, o[3])[l] & 31, clamp = values<u32>(w, o[4])[l];
    const int segment = clamp >> 8 & 31, last = (l & segment) | (clamp & 31 & ~segment);
    const int from = o[0] == 0 ? l - b : o[0] == 1 ? l + b : o[0] == 2 ? l ^ b : (l & segment) | (b & ~segment);
    const bool inside = o[0] == 0 ? from >= last : from <= last;
    result[l] = values<u32>(w, o[2])[inside ? from : l];
    if (o[5] >= 0) values<pred>(w, o[5])[l] = inside;
  }
  memcpy(values<u32>(w, o[1]), result, sizeof result);
}
static bool uniform(Warp& w) {
  int count = 0;
  for (int l = 0; l < LANES; ++l) count += active(w, l);
  if (count != 0 && count != LANES) report(w, 0, "", "the lanes of a warp part at a branch", count);
  return count != 0;
}
static void branch(Warp& w, const int* o) { if (uniform(w)) w.pc = o[0]; }
static void leave(Warp& w, const int*) { if (uniform(w)) w.state = ENDED; }
static void barrier(Warp& w, const int*) { w.state = WAITING; }

// Tensor cores: sums are float32 in order of k. A kind is 0 for f16, 1 for bf16 and 2 for tf32.
static struct { f32 a[16][16], b[16][256], c[16][256]; } tile;
static inline int depth(int kind) { return kind == 2 ? 8 : 16; }
static inline f32 element(int kind, u32 x) {
  return kind == 0 ? (f32)bits<f16>((u16)x) : kind == 1 ? (f32)bits<bf16>((u16)x) : bits<f32>(x & 0xffffe000u);
}
// Reads a factor of 8 or 16 rows from registers and calls put(row, k, value).
template <class Put> static void read_registers(Warp& w, int kind, const int* registers, int rows, Put put) {
  for (int r = 0; r < rows / 4; ++r)
    for (int l = 0; l < LANES; ++l) {
      const u32 x = values<u32>(w, registers[r])[l];
      const int row = l / 4 + r * 8 % rows, k = l % 4, high = r * 8 / rows;
      if (kind == 2) put(row, k + 4 * high, element(kind, x));
      else for (int h = 0; h < 2; ++h) put(row, 2 * k + 8 * high + h, element(kind, x >> 16 * h));
    }
}
// d = c + sign * a b, where c is 0 unless kept
static void multiply(Warp& w, int kind, int n, const int* c, bool keep, f32 sign, const int* d) {
  const auto place = [](int r, int l) -> f32& { return tile.c[l / 4 + r % 4 / 2 * 8][r / 4 * 8 + l % 4 * 2 + r % 2]; };
  for (int r = 0; r < n / 2; ++r)
    for (int l = 0; l < LANES; ++l) place(r, l) = keep ? values<f32>(w, c[r])[l] : 0.f;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < depth(kind); ++k)
      for (int j = 0; j < n; ++j) tile.c[i][j] += sign * tile.a[i][k] * tile.b[k][j];
  for (int r = 0; r < n / 2; ++r)
    for (int l = 0; l < LANES; ++l) values<f32>(w, d[r])[l] = place(r, l);
}
constexpr auto put_a = [](int row, int k, f32 x) { tile.a[row % 16][k] = x; };
constexpr auto put_b = [](int row, int k, f32 x) { tile.b[k][row] = x; };
static void mma(Warp& w, const int* o) {  // o: kind, 4 registers of a, 2 of b, 4 of c, 4 of d
  read_registers(w, o[0], o + 1, 16, put_a);
  read_registers(w, o[0], o + 5, 8, put_b);
  multiply(w, o[0], 8, o + 7, true, 1.f, o + 11);
}
// Reads a factor of wgmma from shared memory, 16 bytes at once, and calls put(row, k, value).
template <class Put>
static void read_shared(Warp& w, int kind, u64 descriptor, int first, int rows, bool transposed, Put put) {
  const auto field = [&](int shift) -> u32 { return (descriptor >> shift & 0x3fff) << 4; };
  const u32 start = field(0), leading = field(16), stride = field(32);
  const int swizzle = descriptor >> 62, width = swizzle ? 256 >> swizzle : 16, mask = swizzle ? (16 >> swizzle) - 1 : 0;
  const int size = kind == 2 ? 4 : 2, chunk = 16 / size, line = width / size;
  for (int row = first; row < first + rows; row += transposed ? chunk : 1)
    for (int k = 0; k < depth(kind); k += transposed ? 1 : chunk) {
      const u32 inside = swizzle ? k * size : k / line * leading + k % line * size;
      const u32 along = row / line * leading + k / 8 * stride + k % 8 * width + row % line * size;
      const u32 address = start + (transposed ? along : row / 8 * stride + row % 8 * width + inside);
      u8 data[16];
      load_bytes(w, 0, false, address ^ (address >> 7 & mask) << 4, data, 16);
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
  if (o[7]) read_registers(w, o[0], o + 8, 16, put_a);
  else read_shared(w, o[0], values<u64>(w, o[8])[0], w.index % 4 * 16, 16, o[5], put_a);
  read_shared(w, o[0], values<u64>(w, o[12])[0], 0, o[1], o[6], put_b);
  multiply(w, o[0], o[1], o + 13, values<pred>(w, o[2])[0], o[3] * o[4], o + 13);
}

using Handler = void (*)(Warp&, const int*);
extern const Handler HANDLERS[];
static void run_program(std::vector<Warp>& warps, const int* grid, bool is_shuffled, std::mt19937& random) {
  const u32 x = grid[0], y = grid[1];
  const u32 places[] = {now.cta % x, now.cta / x % y, now.cta / x / y, x, y, (u32)grid[2]};
  std::vector<Warp*> order;
  for (Warp& w : warps) {
    order.push_back(&w);
    for (int l = 0; l < LANES; ++l) {  // the special registers, in the order of SPECIAL in translate.py
      values<u32>(w, 0)[l] = w.index * LANES + l;
      values<u32>(w, 128)[l] = l;
      for (int i = 0; i < 6; ++i) values<u32>(w, 128 * (2 + i))[l] = places[i];
    }
  }
  for (size_t ended = 0, before = 0; ended < warps.size(); before = ended) {
    ++now.epoch;
    if (is_shuffled) std::shuffle(order.begin(), order.end(), random);
    for (Warp* w : order) {
      if (w->state == WAITING) w->state = RUNNING;
      while (w->state == RUNNING) {
        w->at = &now.program[w->pc++];
        HANDLERS[w->at->handler](*w, now.operands + w->at->first);
      }
    }
    ended = std::count_if(warps.begin(), warps.end(), [](const Warp& w) { return w.state == ENDED; });
    if (before != ended && ended < warps.size())
      report(*order[0], 0, "", "some warps ended while others wait at a barrier", ended);
  }
  for (Warp& w : warps)
    if (!w.copies.empty()) report(w, 0, "", "cp.async that nothing waits for", w.copies[0].to);
}

static Memory memory(u64 begin, u64 end) {  // pages of cells are taken when touched
  const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  return {begin, end, (Cell*)mmap(nullptr, (end - begin + 1) * sizeof(Cell), protection, flags, -1, 0)};
}

// Runs a launch and returns the number of problems. image: registers and constants at the start of a warp.
// order: 0 runs programs and warps in their order, any other number is the seed of a shuffle.
extern "C" int run(const Instruction* program, const int* operands, const u8* image, int image_bytes,
                   const u64* tensors, int count, const int* grid, int num_warps, int shared_bytes,
                   int order, char* text, int room) {
  now = {program, operands, {}, memory(0, shared_bytes), {}, 0, 0, 0, {}, {}};
  for (int i = 0; i < count; ++i) now.tensors.push_back(memory(tensors[2 * i], tensors[2 * i + 1]));
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
  for (Memory& m : now.tensors) munmap(m.cells, (m.end - m.begin + 1) * sizeof(Cell));
  snprintf(text, room, "%s", now.text.c_str());
  return now.problems;
}
