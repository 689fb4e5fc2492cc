// CUDA's execution model on a CPU, as far as csrc/attention/kernels.cuh needs it: the threads of a block, or of a cluster of
// blocks, are fibers that take turns, and switch where they would wait for each other. It takes the place of
// csrc/attention/primitives.cuh and csrc/mlp/cluster.cuh.
//
// Copies to shared memory happen when they are waited for, and shared memory holds not-a-number before, so that a missing
// wait or barrier shows. What one warp does together happens when its last lane arrives; a block that cannot go on aborts.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#define D2_TRT_EMULATED
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 { std::uint32_t x, y; };
struct uint4 { std::uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Index { int x = 0, y = 0, z = 0; };
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace d2_trt {

struct Half {};
struct BFloat16 {};

namespace emulation {

constexpr std::size_t kStack = 128 << 10, kClusterStack = 32 << 10;

struct Lane {
    ucontext_t context;
    std::vector<char> stack;
    std::function<void()> const* work = nullptr;
    std::vector<std::function<void()>> copies;  // of the group that is not ended
    std::deque<std::vector<std::function<void()>>> groups;
    std::uint32_t words[6];
    float* sum = nullptr;
    int cluster_generation = 0;  // of the meeting at which it arrived
    bool begun = false, done = false;
};

struct Meeting {
    int arrived = 0, generation = 0;
};

// One block, or the blocks of a cluster, one after another.
struct Block {
    ucontext_t scheduler;
    std::vector<Lane> lanes;
    std::vector<Meeting> warps;
    std::vector<Meeting> blocks;
    Meeting cluster;
    std::vector<std::vector<std::uint64_t>> shared;
    int current = 0;
    bool moved = false;
};
inline Block* block = nullptr;

inline Lane& lane() { return block->lanes[block->current]; }
inline int rank() { return block->current / blockDim.x; }
inline void yield() { swapcontext(&lane().context, &block->scheduler); }

// Waits until `count` threads came; the last of them first does what they came for.
template <typename Action>
void meet(Meeting& meeting, int count, Action&& action) {
    block->moved = true;
    int const generation = meeting.generation;
    if (++meeting.arrived == count) {
        action();
        meeting.arrived = 0;
        ++meeting.generation;
        return;
    }
    while (meeting.generation == generation) yield();
    block->moved = true;
}

template <typename Action>
void meet_warp(Action&& action) {
    meet(block->warps[block->current / 32], 32, [&] { action(&block->lanes[block->current / 32 * 32]); });
}

inline void enter() {
    lane().begun = true;
    (*lane().work)();
    lane().done = block->moved = true;
    swapcontext(&lane().context, &block->scheduler);
}

// Memory that a kernel may read, where whoever runs it has said: more is an error, also of what is not used then.
inline std::vector<std::pair<char const*, std::size_t>> readable;

inline void check_read(void const* from, std::size_t bytes) {
    auto const* const first = static_cast<char const*>(from);
    for (auto const& [start, size] : readable) {
        if (first >= start && first + bytes <= start + size) return;
    }
    if (readable.empty()) return;
    std::fprintf(stderr, "%zu bytes are read outside of the tensors\n", bytes);
    std::abort();
}

// Runs a kernel for every block of a grid, `cluster` of them along x at a time. backwards: the last thread has the first turn.
// The block that has it goes as far as it comes before others of its cluster begin.
inline void run(
    Index grid, int threads, std::size_t shared_bytes, bool backwards, std::function<void()> const& kernel, int cluster = 1) {
    Block running;
    int const all = threads * cluster;
    running.lanes.resize(all);
    running.warps.resize(all / 32);
    running.blocks.resize(cluster);
    running.shared.resize(cluster);
    for (Lane& l : running.lanes) l.stack.resize(cluster > 1 ? kClusterStack : kStack);
    block = &running;
    blockDim = {threads, 1, 1};
    gridDim = grid;
    for (int z = 0; z < grid.z; ++z) {
        for (int y = 0; y < grid.y; ++y) {
            for (int x = 0; x < grid.x; x += cluster) {
                for (auto& shared : running.shared) shared.assign(shared_bytes / 8 + 2, ~std::uint64_t{0});
                for (Lane& l : running.lanes) {
                    l.work = &kernel;
                    l.begun = l.done = false;
                    l.copies.clear();
                    l.groups.clear();
                    getcontext(&l.context);
                    l.context.uc_stack.ss_sp = l.stack.data();
                    l.context.uc_stack.ss_size = l.stack.size();
                    l.context.uc_link = nullptr;
                    makecontext(&l.context, &enter, 0);
                }
                bool ahead = cluster > 1;
                for (bool left = true; left;) {
                    left = ahead;
                    running.moved = false;
                    for (int i = 0; i < (ahead ? threads : all); ++i) {
                        running.current = backwards ? all - 1 - i : i;
                        if (lane().done) continue;
                        left = true;
                        threadIdx = {running.current % threads, 0, 0};
                        blockIdx = {x + running.current / threads, y, z};
                        swapcontext(&running.scheduler, &lane().context);
                    }
                    if (ahead) {
                        ahead = running.moved;
                        continue;
                    }
                    if (left && !running.moved) {
                        std::fprintf(stderr, "block (%d, %d, %d) waits for itself\n", x, y, z);
                        std::abort();
                    }
                }
            }
        }
    }
    block = nullptr;
}

inline std::uint32_t bits(float x) {
    std::uint32_t out;
    std::memcpy(&out, &x, 4);
    return out;
}
inline float number(std::uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

template <typename T>
std::uint16_t round_to(float x);
template <>
inline std::uint16_t round_to<BFloat16>(float x) {
    std::uint32_t const b = bits(x);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<std::uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
template <>
inline std::uint16_t round_to<Half>(float x) {
    std::uint16_t const sign = bits(x) >> 16 & 0x8000;
    float const size = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (size == 0.f) return sign;
    if (size >= 65520.f) return sign | 0x7c00;
    int exponent = 0;
    std::frexp(size, &exponent);  // size = f * 2 ** exponent with f in [1/2, 1)
    int const unit = std::max(exponent - 11, -24);
    long const count = std::lrint(std::ldexp(size, -unit));  // ties to even
    if (unit == -24) return sign | static_cast<std::uint16_t>(count);  // subnormal, or the first of the normal ones
    return sign | static_cast<std::uint16_t>(((unit + 24) << 10) + count);
}

template <typename T>
float widen(std::uint16_t x);
template <>
inline float widen<BFloat16>(std::uint16_t x) { return number(static_cast<std::uint32_t>(x) << 16); }
template <>
inline float widen<Half>(std::uint16_t x) {
    int const exponent = x >> 10 & 31, fraction = x & 1023;
    float const sign = x & 0x8000 ? -1.f : 1.f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

}  // namespace emulation

template <typename T>
std::uint32_t pack(float low, float high) {
    return emulation::round_to<T>(low) | static_cast<std::uint32_t>(emulation::round_to<T>(high)) << 16;
}
template <typename T>
float2 unpack(std::uint32_t pair) {
    return {emulation::widen<T>(pair & 0xffff), emulation::widen<T>(pair >> 16)};
}

inline float as_float(std::uint32_t bits) { return emulation::number(bits); }

// The layouts are those of mma.m16n8k16 with 16-bit floats in the PTX ISA (figures of the A, B and C fragments).
template <typename T>
void multiply(
    float (&sum)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
    std::uint32_t b1) {
    emulation::Lane& mine = emulation::lane();
    std::uint32_t const words[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(mine.words, words, sizeof words);
    mine.sum = sum;
    emulation::meet_warp([](emulation::Lane* lanes) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            int const group = lane >> 2, in_group = lane % 4;
            for (int i = 0; i < 8; ++i) {
                int const row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
                int const column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
                float2 const pair = unpack<T>(lanes[lane].words[i / 2]);
                a[row][column] = i & 1 ? pair.y : pair.x;
            }
            for (int i = 0; i < 4; ++i) {
                float2 const pair = unpack<T>(lanes[lane].words[4 + i / 2]);
                b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = i & 1 ? pair.y : pair.x;
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                int const row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
                float total = lanes[lane].sum[i];
                for (int k = 0; k < 16; ++k) total += a[row][k] * b[k][column];
                lanes[lane].sum[i] = total;
            }
        }
    });
}

inline std::uint32_t halves(std::uint32_t first, std::uint32_t second, int which) {
    return which ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
}
inline float exp2_fast(float x) { return std::exp2(x); }

template <typename V>
V shuffle_xor(V value, int lanes) {
    static_assert(sizeof(V) == 4);
    std::memcpy(emulation::lane().words, &value, 4);
    int const other = (emulation::block->current % 32) ^ lanes;
    V result;
    emulation::Lane const* const from = &emulation::block->lanes[emulation::block->current / 32 * 32 + other];
    emulation::meet_warp([](emulation::Lane*) {});
    std::memcpy(&result, from->words, 4);
    emulation::meet_warp([](emulation::Lane*) {});  // before anybody writes again
    return result;
}

inline std::uint32_t ballot(bool holds) {
    emulation::lane().words[0] = holds;
    emulation::meet_warp([](emulation::Lane* lanes) {
        std::uint32_t all = 0;
        for (int i = 0; i < 32; ++i) all |= lanes[i].words[0] << i;
        for (int i = 0; i < 32; ++i) lanes[i].words[1] = all;
    });
    return emulation::lane().words[1];
}
inline bool any_lane(bool holds) { return ballot(holds) != 0; }

inline void sync_block() { emulation::meet(emulation::block->blocks[emulation::rank()], blockDim.x, [] {}); }
inline unsigned char* shared_memory() {
    // Aligned to 16 bytes.
    auto const address = reinterpret_cast<std::uintptr_t>(emulation::block->shared[emulation::rank()].data());
    return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
}

template <typename V>
V* peer_memory(V* own, int rank) {
    emulation::Lane const& peer = emulation::block->lanes[rank * blockDim.x];
    if (!peer.begun || peer.done) {
        std::fprintf(stderr, "a block whose memory is asked for %s\n", peer.done ? "has ended" : "has not begun");
        std::abort();
    }
    auto const base = [](int of) {
        auto const address = reinterpret_cast<std::uintptr_t>(emulation::block->shared[of].data());
        return (address + 15) / 16 * 16;
    };
    return reinterpret_cast<V*>(reinterpret_cast<std::uintptr_t>(own) - base(emulation::rank()) + base(rank));
}
inline void cluster_arrive() {
    emulation::Meeting& meeting = emulation::block->cluster;
    emulation::block->moved = true;
    emulation::lane().cluster_generation = meeting.generation;
    if (++meeting.arrived == static_cast<int>(emulation::block->lanes.size())) meeting = {0, meeting.generation + 1};
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
    while (emulation::block->cluster.generation == emulation::lane().cluster_generation) emulation::yield();
    emulation::block->moved = true;
}
inline void prefetch(void const*) {}

using Mailbox = std::uint64_t;  // bytes that are missing
inline void open_mailbox(Mailbox* box, int bytes) { *box = static_cast<std::uint64_t>(bytes); }
inline void send(float2* to, float2 const& value, Mailbox* box, int rank) {
    *peer_memory(to, rank) = value;
    *peer_memory(box, rank) -= sizeof value;
    emulation::block->moved = true;
}
inline void await_mailbox(Mailbox* box) {
    while (*box != 0) emulation::yield();
    emulation::block->moved = true;
}

inline void copy_async(void* to, void const* from, bool clear) {
    auto const misaligned = (reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16;
    if (misaligned) {
        std::fprintf(stderr, "a copy of 16 bytes is not aligned to them\n");
        std::abort();
    }
    if (!clear) emulation::check_read(from, 16);
    emulation::lane().copies.push_back([=] { clear ? std::memset(to, 0, 16) : std::memcpy(to, from, 16); });
}
inline void end_copies() { emulation::lane().groups.push_back(std::move(emulation::lane().copies)); }
template <int kLater>
void wait_copies() {
    auto& groups = emulation::lane().groups;
    while (groups.size() > kLater) {
        for (auto const& copy : groups.front()) copy();
        groups.pop_front();
    }
}

template <typename V>
V load(V const* from) {
    emulation::check_read(from, sizeof(V));
    return *from;
}

}  // namespace d2_trt
