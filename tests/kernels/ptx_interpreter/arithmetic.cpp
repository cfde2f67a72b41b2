// Numbers from numbers, each lane by itself. Contraction is off where this is compiled: products and sums round where PTX says.
#include <algorithm>
#include <cmath>

#include "instructions.h"

namespace ptx {

namespace {

using U16 = std::uint16_t;
using U32 = std::uint32_t;
using U64 = std::uint64_t;
using S32 = std::int32_t;
using S64 = std::int64_t;

// Below the normal range, zero.
float flush(float number) { return std::fabs(number) < 0x1p-126f ? std::copysign(0.0f, number) : number; }

// a b + c rounded towards minus infinity: the product is exact in double, and so is what the sum loses.
float multiply_add_down(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  const double of_product = sum - c, lost = (product - of_product) + (c - (sum - of_product));
  const float rounded = static_cast<float>(sum);
  const bool above = rounded > sum || (rounded == sum && lost < 0.0);
  return above && std::isfinite(rounded) ? std::nextafterf(rounded, -INFINITY) : as_computed(rounded);
}

U32 insert_bits(U32 field, U32 into, U32 position, U32 length) {
  const U64 mask = (length >= 32 ? ~U64{0} : (U64{1} << length) - 1) << position;
  return static_cast<U32>((into & ~mask) | (static_cast<U64>(field) << position & mask));
}

template <typename T>
T shift_left(T a, U32 by) {
  return by < 8 * sizeof(T) ? a << by : T{0};
}
template <typename T>
T shift_right(T a, U32 by) {  // of a signed number, all that remains is its sign
  const U32 most = 8 * sizeof(T) - 1;
  return by <= most ? a >> by : std::is_signed_v<T> ? a >> most : T{0};
}

template <typename T>
T divide(T a, T b) {
  if (b == 0) throw std::domain_error("a division by zero");
  return a / b;
}
template <typename T>
T remainder(T a, T b) {
  if (b == 0) throw std::domain_error("a division by zero");
  return a % b;
}

// What is chosen alone has to be known, and what chooses.
template <typename T>
Operation select() {
  return {Form::kDestination, [](Warp& warp, const Instruction& instruction, Lanes lanes) {
            const int first = instruction.sources[0], second = instruction.sources[1], which = instruction.sources[2];
            const U64 *a = warp.values(first), *b = warp.values(second), *choice = warp.values(which);
            U64* const results = warp.values(instruction.destinations[0]);
            Lanes chosen = 0;
            for (int lane = 0; lane < kWarpSize; ++lane) chosen |= static_cast<Lanes>(choice[lane] & 1) << lane;
            const Unknown one = warp.unknown(first), other = warp.unknown(second);
            const Lanes either = warp.unknown(which).either();
            const Unknown unknown{(chosen & one.low) | (~chosen & other.low) | either,
                                  (chosen & one.high) | (~chosen & other.high) | either};
            for_each(lanes, [&](int lane) { results[lane] = bits_of(number_of<T>(choice[lane] & 1 ? a[lane] : b[lane])); });
            warp.set_unknown(instruction.destinations[0], lanes, unknown);
            return Outcome::kNext;
          }};
}

// A predicate that decides by itself is enough: `false and unknown` is false, `true or unknown` true.
template <bool deciding, typename Function>
Operation logic(Function function) {
  return {Form::kDestination, [function](Warp& warp, const Instruction& instruction, Lanes lanes) {
            const int first = instruction.sources[0], second = instruction.sources[1];
            const U64 *a = warp.values(first), *b = warp.values(second);
            Lanes decided = 0;
            for (int lane = 0; lane < kWarpSize; ++lane) {
              const bool by_first = (a[lane] & 1) == deciding && !(warp.unknown(first).either() >> lane & 1);
              const bool by_second = (b[lane] & 1) == deciding && !(warp.unknown(second).either() >> lane & 1);
              decided |= static_cast<Lanes>(by_first || by_second) << lane;
            }
            const Lanes unknown = (warp.unknown(first).either() | warp.unknown(second).either()) & ~decided;
            U64* const results = warp.values(instruction.destinations[0]);
            for_each(lanes, [&](int lane) { results[lane] = decided >> lane & 1 ? deciding : function(a[lane], b[lane]) & 1; });
            warp.set_unknown(instruction.destinations[0], lanes, {unknown, unknown});
            return Outcome::kNext;
          }};
}

// Bytes of two words, one for each of the selector's digits.
Outcome permute(Warp& warp, const Instruction& instruction, Lanes lanes) {
  const int first = instruction.sources[0], second = instruction.sources[1];
  const U64 *a = warp.values(first), *b = warp.values(second), *selectors = warp.values(instruction.sources[2]);
  warp.require_known(instruction, instruction.sources[2], lanes, "says how bytes are permuted");
  const Lanes half_unknown[] = {warp.unknown(first).low, warp.unknown(first).high, warp.unknown(second).low, warp.unknown(second).high};
  Unknown unknown{0, 0};
  U64* const results = warp.values(instruction.destinations[0]);
  for_each(lanes, [&](int lane) {
    const U64 bytes = b[lane] << 32 | a[lane];
    U64 result = 0;
    for (int k = 0; k < 4; ++k) {
      const U64 digit = selectors[lane] >> 4 * k & 15;
      if (digit > 7) throw std::domain_error("a sign that is copied, which is not understood");
      result |= (bytes >> 8 * digit & 255) << 8 * k;
      (k < 2 ? unknown.low : unknown.high) |= half_unknown[digit / 2] & Lanes{1} << lane;
    }
    results[lane] = result;
  });
  warp.set_unknown(instruction.destinations[0], lanes, unknown);
  return Outcome::kNext;
}

template <typename T>
Operation move() {
  return in_halves<T, T>([](T a) { return a; }, [](const Unknown& a, const Unknown&) { return a; });
}

}  // namespace

void add_arithmetic(Table& table) {
  for (const char* type : {"b32", "u32", "f32"}) table[std::string("mov.") + type] = move<U32>();
  for (const char* type : {"b64", "u64", "f64"}) table[std::string("mov.") + type] = move<U64>();
  table["mov.u16"] = move<U16>();
  table["mov.pred"] = lanewise<U64, U64>([](U64 a) { return a & 1; });
  table["selp.b32"] = table["selp.u32"] = table["selp.f32"] = select<U32>();
  table["selp.b64"] = select<U64>();
  table["selp.u16"] = select<U16>();

  table["add.s32"] = lanewise<U32, U32, U32>([](U32 a, U32 b) { return a + b; });
  table["sub.s32"] = lanewise<U32, U32, U32>([](U32 a, U32 b) { return a - b; });
  table["mul.lo.s32"] = lanewise<U32, U32, U32>([](U32 a, U32 b) { return a * b; });
  table["mad.lo.s32"] = lanewise<U32, U32, U32, U32>([](U32 a, U32 b, U32 c) { return a * b + c; });
  table["mul.wide.s32"] = lanewise<S64, S32, S32>([](S32 a, S32 b) { return static_cast<S64>(a) * b; });
  table["mul.wide.u16"] = lanewise<U32, U16, U16>([](U32 a, U32 b) { return a * b; });
  table["div.u32"] = lanewise<U32, U32, U32>(divide<U32>);
  table["div.s32"] = lanewise<S32, S32, S32>(divide<S32>);
  table["rem.s32"] = lanewise<S32, S32, S32>(remainder<S32>);
  table["min.s32"] = lanewise<S32, S32, S32>([](S32 a, S32 b) { return std::min(a, b); });
  table["max.s32"] = lanewise<S32, S32, S32>([](S32 a, S32 b) { return std::max(a, b); });
  table["add.s64"] = lanewise<U64, U64, U64>([](U64 a, U64 b) { return a + b; });
  table["sub.s64"] = lanewise<U64, U64, U64>([](U64 a, U64 b) { return a - b; });
  table["mul.lo.s64"] = lanewise<U64, U64, U64>([](U64 a, U64 b) { return a * b; });
  table["div.s64"] = lanewise<S64, S64, S64>(divide<S64>);

  table["and.b32"] = lanewise<U32, U32, U32>([](U32 a, U32 b) { return a & b; });
  table["or.b32"] = lanewise<U32, U32, U32>([](U32 a, U32 b) { return a | b; });
  table["xor.b32"] = lanewise<U32, U32, U32>([](U32 a, U32 b) { return a ^ b; });
  table["not.b32"] = lanewise<U32, U32>([](U32 a) { return ~a; });
  table["and.b64"] = lanewise<U64, U64, U64>([](U64 a, U64 b) { return a & b; });
  table["or.b64"] = lanewise<U64, U64, U64>([](U64 a, U64 b) { return a | b; });
  table["and.pred"] = logic<false>([](U64 a, U64 b) { return a & b; });
  table["or.pred"] = logic<true>([](U64 a, U64 b) { return a | b; });
  table["xor.pred"] = lanewise<U64, U64, U64>([](U64 a, U64 b) { return (a ^ b) & 1; });
  table["not.pred"] = lanewise<U64, U64>([](U64 a) { return ~a & 1; });
  table["shl.b32"] = lanewise<U32, U32, U32>(shift_left<U32>);
  table["shl.b64"] = lanewise<U64, U64, U32>(shift_left<U64>);
  table["shr.u32"] = lanewise<U32, U32, U32>(shift_right<U32>);
  table["shr.s32"] = lanewise<S32, S32, U32>(shift_right<S32>);
  table["shr.u64"] = lanewise<U64, U64, U32>(shift_right<U64>);
  table["shr.s64"] = lanewise<S64, S64, U32>(shift_right<S64>);
  table["prmt.b32"] = {Form::kDestination, permute};
  table["bfi.b32"] = lanewise<U32, U32, U32, U32, U32>(insert_bits);

  table["add.f32"] = lanewise<float, float, float>([](float a, float b) { return as_computed(a + b); });
  table["sub.f32"] = lanewise<float, float, float>([](float a, float b) { return as_computed(a - b); });
  table["mul.f32"] = lanewise<float, float, float>([](float a, float b) { return as_computed(a * b); });
  table["div.rn.f32"] = lanewise<float, float, float>([](float a, float b) { return as_computed(a / b); });
  table["fma.rn.f32"] = lanewise<float, float, float, float>([](float a, float b, float c) { return as_computed(std::fmaf(a, b, c)); });
  table["fma.rm.f32"] = lanewise<float, float, float, float>(multiply_add_down);
  table["neg.f32"] = lanewise<U32, U32>([](U32 a) { return a ^ 0x80000000u; });
  table["rcp.rn.f32"] = lanewise<float, float>([](float a) { return as_computed(1.0f / a); });
  table["sqrt.rn.f32"] = lanewise<float, float>([](float a) { return as_computed(std::sqrt(a)); });
  // A GPU's is off by up to two units in the last place.
  table["ex2.approx.ftz.f32"] = lanewise<float, float>([](float a) { return as_computed(flush(std::exp2(flush(a)))); });
  table["add.f64"] = lanewise<double, double, double>([](double a, double b) { return a + b; });
}

}  // namespace ptx
