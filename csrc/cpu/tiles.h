// The loops of primitives.h for streams and parameters in bfloat16 on the processor's matrix unit (AMX), which multiplies 16 x 32 numbers
// by 32 x 16 and sums in float32.
//
// What is stored in bfloat16 is multiplied as it is. Coefficients, and rows that had to be computed, are float32; they are cut in two,
// v = hi + rest, of which the unit takes both: sixteen bits, where all that comes out is rounded to eight. Along the sum an operand has
// its numbers in pairs, which lie next to each other. Subnormal numbers count as zero here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "buffer.h"
#include "primitives.h"

namespace steer::cpu::STEER_NAMESPACE {

constexpr int kTileRows = 32;  // frames that are taken together: two tiles

#if defined(__AMX_BF16__)

template <typename S>
constexpr bool kTiles = std::is_same_v<S, BFloat16>;

// The unit, for one thread as long as this lives. Experts come in units of sixteen, `units` of them, with zeros after the last; rows have
// `width` columns, a multiple of 64.
class Tiles {
 public:
  // Numbers of float that a matrix takes as the right operand of dots, or of mix.
  static std::int64_t dots_room(std::int64_t experts, std::int64_t width) { return units_of(experts) * 8 * width; }
  static std::int64_t mix_room(std::int64_t experts, std::int64_t width) { return units_of(experts) * 16 * width; }

  // M (E, D), for every 32 columns a tile a unit: row k holds columns 2 k and 2 k + 1 of its experts. Returns what follows.
  static float* arrange_for_dots(const BFloat16* M, std::int64_t experts, std::int64_t width, float* room) {
    for (std::int64_t d = 0; d < width; d += 32)
      for (std::int64_t e = 0; e < experts; e += 16, room += kTile) {
        __m512i rows[16] = {};
        for (std::int64_t i = 0; i < std::min<std::int64_t>(16, experts - e); ++i) rows[i] = _mm512_loadu_si512(M + (e + i) * width + d);
        transpose(rows);
        for (int k = 0; k < 16; ++k) _mm512_store_si512(room + 16 * k, rows[k]);
      }
    return room;
  }

  // M (E, D), for every 16 columns a tile a unit: rows k and 8 + k hold experts 2 k and 2 k + 1, to be multiplied by a coefficient's parts.
  static float* arrange_for_mix(const BFloat16* M, std::int64_t experts, std::int64_t width, float* room) {
    const auto load = [&](std::int64_t e, std::int64_t d) {
      if (e >= experts) return _mm512_setzero_si512();
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(M + e * width + d)));
    };
    for (std::int64_t d = 0; d < width; d += 16)
      for (std::int64_t e = 0; e < experts; e += 16, room += kTile)
        for (int k = 0; k < 8; ++k) {
          const __m512i pair = _mm512_or_si512(load(e + 2 * k, d), _mm512_slli_epi32(load(e + 2 * k + 1, d), 16));
          _mm512_store_si512(room + 16 * k, pair);
          _mm512_store_si512(room + 16 * (8 + k), pair);
        }
    return room;
  }

  // Coefficients (rows, E) as left operands: of mix, a tile for each 16 rows of a unit, which holds hi and rest of its experts; of outer,
  // transposed, a tile of hi and one of rest for each unit.
  struct Coefficients {
    explicit Coefficients(std::int64_t experts) : for_mix(units_of(experts) * 2 * kTile), for_outer(units_of(experts) * 2 * kTile) {}
    Buffer<float> for_mix, for_outer;
  };

  explicit Tiles(std::int64_t experts, std::int64_t width) : experts_(experts), units_(units_of(experts)), width_(width) {
    struct {
      std::uint8_t palette = 1, start = 0, unused[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    stored();
    _tile_loadconfig(&shape);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }

  void cut(const float* c, int count, Coefficients& to) const {
    for (std::int64_t unit = 0; unit < units_; ++unit) {
      const __mmask16 there = static_cast<__mmask16>((1u << std::min<std::int64_t>(16, experts_ - 16 * unit)) - 1);
      auto* mix = reinterpret_cast<BFloat16*>(to.for_mix.data() + unit * 2 * kTile);
      __m512i hi[16], rest[16];
      for (int r = 0; r < kTileRows; r += 2) {
        Cut rows[2];
        for (int i = 0; i < 2; ++i) {
          if (r + i < count) rows[i] = Cut(_mm512_maskz_loadu_ps(there, c + (r + i) * experts_ + 16 * unit));
          _mm256_store_si256(reinterpret_cast<__m256i*>(mix + (r + i) * 32), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rows[i].hi, 16)));
          _mm256_store_si256(reinterpret_cast<__m256i*>(mix + (r + i) * 32 + 16),
                             _mm512_cvtepi32_epi16(_mm512_srli_epi32(rows[i].rest, 16)));
        }
        hi[r / 2] = pair(rows[0].hi, rows[1].hi);
        rest[r / 2] = pair(rows[0].rest, rows[1].rest);
      }
      transpose(hi);
      transpose(rest);
      float* outer = to.for_outer.data() + unit * 2 * kTile;
      for (int e = 0; e < 16; ++e) {
        _mm512_store_si512(outer + 16 * e, hi[e]);
        _mm512_store_si512(outer + kTile + 16 * e, rest[e]);
      }
    }
  }

  // z[r][e] = sum_d rows[r][d] M[e][d] for `count` of kTileRows rows, all of which have to be there, as are those of `rest` unless null,
  // which are added to them. `meanwhile(d)` is called once for every 64 columns.
  template <typename Meanwhile>
  void dots(const BFloat16* rows, const BFloat16* rest, int count, const float* M, float* z, Meanwhile&& meanwhile) {
    const std::int64_t apart = 2 * width_;
    for (std::int64_t unit = 0; unit < units_; ++unit) {
      zero_sums();
      stored();
      for (std::int64_t d = 0; d < width_; d += 64) {
        if (unit == 0) meanwhile(d);
        const float* tile = M + (d / 32 * units_ + unit) * kTile;
        _tile_loadd(6, tile, 64);
        _tile_loadd(7, tile + units_ * kTile, 64);
        const auto multiply = [&](const BFloat16* from) __attribute__((always_inline)) {
          const BFloat16* second = from + 16 * width_;
          _tile_loadd(4, from, apart);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(5, second, apart);
          _tile_dpbf16ps(2, 5, 6);
          _tile_loadd(4, from + 32, apart);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, second + 32, apart);
          _tile_dpbf16ps(3, 5, 7);
        };
        multiply(rows + d);
        if (rest != nullptr) multiply(rest + d);
      }
      store_sums(sums_[0], 32);
      const std::int64_t there = std::min<std::int64_t>(16, experts_ - 16 * unit);
      for (int r = 0; r < count; ++r) {
        const float* from = sums_[0] + 32 * r;
        for (std::int64_t e = 0; e < there; ++e) z[r * experts_ + 16 * unit + e] = from[e] + from[16 + e];
      }
    }
  }

  // sum_e c[r][e] M[e][d] of a block of 64 columns from `d` on, to be emitted; two of them, `which`, may wait.
  void mix_block(const Coefficients& c, const float* M, std::int64_t d, int which) {
    for (int half = 0; half < 2; ++half) {
      const float* right = M + (d / 16 + 2 * half) * units_ * kTile;
      const float* left = c.for_mix.data();
      zero_sums();
      stored();
      for (std::int64_t unit = 0; unit < units_; ++unit, left += 2 * kTile, right += kTile) {
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + units_ * kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      store_sums(sums_[which] + 32 * half, 64);
    }
  }

  // emit(whole, r, d, values) as in primitives.h.
  template <typename Emit>
  void emit_block(int which, int count, std::int64_t d, Emit&& emit) const {
    for (int r = 0; r < count; ++r) {
      Vector<float> values[kRegisters];
      for (int k = 0; k < kRegisters; ++k) values[k] = Vector<float>::load(sums_[which] + 64 * r + 16 * k);
      emit(std::true_type(), r, d, values);
    }
  }

  // acc[e][..] += sum_r c[r][e] row(K, r, 0)[..]: a block of K registers, as in primitives.h. Rows of bfloat16 are one part.
  template <typename Row>
  void outer_block(Row&& row, int count, const Coefficients& c, float* acc) {
    using Number = std::remove_cv_t<std::remove_pointer_t<decltype(row(std::integral_constant<int, kRegisters>(), 0, 0))>>;
    constexpr bool two = std::is_same_v<Number, float>;
    for (int r = 0; r < kTileRows; r += 2) {
      const Number* rows[2] = {};
      for (int i = 0; i < 2; ++i)
        if (r + i < count) rows[i] = row(std::integral_constant<int, kRegisters>(), r + i, 0);
      for (int k = 0; k < kRegisters; ++k) {
        Cut parts[2];
        for (int i = 0; i < 2; ++i)
          if (rows[i] != nullptr) parts[i] = Cut(Vector<float>::load(rows[i] + 16 * k).v);
        float* to = right_ + 2 * k * kTile + r / 2 * 16;
        _mm512_store_si512(to, pair(parts[0].hi, parts[1].hi));
        if (two) _mm512_store_si512(to + kTile, pair(parts[0].rest, parts[1].rest));
      }
    }
    for (std::int64_t unit = 0; unit < units_; ++unit) {
      const float* left = c.for_outer.data() + unit * 2 * kTile;
      zero_sums();
      stored();
      _tile_loadd(4, left, 64);
      _tile_loadd(5, left + kTile, 64);
#define STEER_COLUMNS(k)                              \
  _tile_loadd(6, right_ + 2 * k * kTile, 64);         \
  _tile_dpbf16ps(k, 4, 6);                            \
  _tile_dpbf16ps(k, 5, 6);                            \
  if constexpr (two) {                                \
    _tile_loadd(7, right_ + (2 * k + 1) * kTile, 64); \
    _tile_dpbf16ps(k, 4, 7);                          \
  }
      STEER_COLUMNS(0)
      STEER_COLUMNS(1)
      STEER_COLUMNS(2)
      STEER_COLUMNS(3)
#undef STEER_COLUMNS
      _tile_stored(0, sums_[0], 256);
      _tile_stored(1, sums_[0] + 16, 256);
      _tile_stored(2, sums_[0] + 32, 256);
      _tile_stored(3, sums_[0] + 48, 256);
      stored();
      const std::int64_t there = std::min<std::int64_t>(16, experts_ - 16 * unit);
      float* out = acc + 16 * unit * kColumns<float>;
      for (std::int64_t i = 0; i < there * kColumns<float>; i += 16)
        (Vector<float>::load(out + i) + Vector<float>::load(sums_[0] + i)).store(out + i);
    }
  }

 private:
  static constexpr std::int64_t kTile = 256;  // a tile in numbers of float

  // A float's two parts, each in the upper half of 32 bits.
  struct Cut {
    __m512i hi = _mm512_setzero_si512(), rest = _mm512_setzero_si512();

    Cut() = default;
    explicit Cut(__m512 v) : hi(rounded(v)), rest(rounded(_mm512_sub_ps(v, _mm512_castsi512_ps(hi)))) {}

    // Not of a NaN, whose carry could reach the sign and leave a zero.
    static __m512i rounded(__m512 v) {
      const __m512i bits = _mm512_castps_si512(v);
      const __mmask16 numbers = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
      const __m512i half = _mm512_mask_add_epi32(bits, numbers, bits, _mm512_set1_epi32(0x8000));
      return _mm512_and_si512(half, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    }
  };

  static __m512i pair(__m512i a, __m512i b) { return _mm512_or_si512(_mm512_srli_epi32(a, 16), b); }

  static void transpose(__m512i (&rows)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
        rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
      }
    for (int i = 0; i < 16; i += 8)
      for (int j = 0; j < 4; ++j) {
        t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
        t[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
      }
    for (int j = 0; j < 8; ++j) {
      rows[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
      rows[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
  }

  // Tiles 0 to 3 are sums, 4 and 5 left operands, 6 and 7 right ones.
  static void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // The sums, two by two, as 32 rows of 32 numbers, which are `row` numbers apart.
  static void store_sums(float* to, std::int64_t row) {
    _tile_stored(0, to, 4 * row);
    _tile_stored(1, to + 16, 4 * row);
    _tile_stored(2, to + 16 * row, 4 * row);
    _tile_stored(3, to + 16 * row + 16, 4 * row);
    stored();
  }

  // GCC's instructions on tiles do not say that they read memory: keeps what was stored before them before them.
  static void stored() { asm volatile("" ::: "memory"); }

  static std::int64_t units_of(std::int64_t experts) { return (experts + 15) / 16; }

  const std::int64_t experts_, units_, width_;
  alignas(64) float right_[8 * kTile];         // rows of outer: for every 16 columns two parts
  alignas(64) float sums_[2][kTileRows * 64];  // what tiles have come to
};

#else

template <typename S>
constexpr bool kTiles = false;

// Named where kTiles is true, so never used.
class Tiles {
 public:
  static std::int64_t dots_room(std::int64_t, std::int64_t);
  static std::int64_t mix_room(std::int64_t, std::int64_t);
  static float* arrange_for_dots(const BFloat16*, std::int64_t, std::int64_t, float*);
  static float* arrange_for_mix(const BFloat16*, std::int64_t, std::int64_t, float*);
  struct Coefficients {
    explicit Coefficients(std::int64_t);
  };
  Tiles(std::int64_t, std::int64_t);
  void cut(const float*, int, Coefficients&) const;
  template <typename Meanwhile>
  void dots(const BFloat16*, const BFloat16*, int, const float*, float*, Meanwhile&&);
  void mix_block(const Coefficients&, const float*, std::int64_t, int);
  template <typename Emit>
  void emit_block(int, int, std::int64_t, Emit&&) const;
  template <typename Row>
  void outer_block(Row&&, int, const Coefficients&, float*);
};

#endif

// kTileRows rows as dots takes them, where the stream has them not: cut in two, or fewer than that.
class TiledRows {
 public:
  explicit TiledRows(std::int64_t width) : width_(width), rows_(2 * kTileRows * width) {
    std::fill_n(rows_.data(), 2 * kTileRows * width, BFloat16{});
  }
  const BFloat16* hi() const { return rows_.data(); }
  const BFloat16* rest() const { return rows_.data() + kTileRows * width_; }

  // Row `r`, in two parts.
  void cut(const float* row, int r) {
    using V = Vector<float>;
    BFloat16 *hi = rows_.data() + r * width_, *rest = hi + kTileRows * width_;
    for (std::int64_t d = 0; d < width_; d += V::kLanes) {
      const V v = V::load(row + d);
      v.store(hi + d);
      (v - V::load(hi + d)).store(rest + d);
    }
  }

  // `rows` itself where all are there, else a copy.
  const BFloat16* whole(const BFloat16* rows, int count) {
    if (count == kTileRows) return rows;
    std::copy_n(rows, count * width_, rows_.data());
    return rows_.data();
  }

 private:
  const std::int64_t width_;
  Buffer<BFloat16> rows_;
};

}  // namespace steer::cpu::STEER_NAMESPACE
