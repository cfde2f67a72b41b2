// From one type to another, and comparisons.
#include <cmath>

#include "instructions.h"

namespace ptx {

namespace {

std::uint16_t to_half(float number) {
  if (number != number) return 0x7fff;
  const _Float16 half = static_cast<_Float16>(number);
  return static_cast<std::uint16_t>(bits_of(half));
}

std::uint16_t to_bfloat16(float number) {
  if (number != number) return 0x7fff;
  const std::uint32_t bits = number_of<std::uint32_t>(bits_of(number));
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Two numbers in a word, the first in its upper half.
template <std::uint16_t (*narrow)(float)>
Operation convert_pair() {
  return in_halves<std::uint32_t, float, float>(
      [](float high, float low) { return static_cast<std::uint32_t>(narrow(high)) << 16 | narrow(low); },
      [](const Unknown& high, const Unknown& low) { return Unknown{low.either(), high.either()}; });
}

template <typename To, typename From>
Operation convert() {
  return lanewise<To, From>([](From from) { return static_cast<To>(from); });
}

template <typename T>
void add_order(Table& table, const std::string& type) {
  table["setp.eq." + type] = lanewise<bool, T, T>([](T a, T b) { return a == b; });
  table["setp.ne." + type] = lanewise<bool, T, T>([](T a, T b) { return a < b || a > b; });  // of a NaN, false
  table["setp.lt." + type] = lanewise<bool, T, T>([](T a, T b) { return a < b; });
  table["setp.le." + type] = lanewise<bool, T, T>([](T a, T b) { return a <= b; });
  table["setp.gt." + type] = lanewise<bool, T, T>([](T a, T b) { return a > b; });
  table["setp.ge." + type] = lanewise<bool, T, T>([](T a, T b) { return a >= b; });
}

}  // namespace

void add_conversions(Table& table) {
  table["cvt.s64.s32"] = convert<std::int64_t, std::int32_t>();
  table["cvt.u64.u32"] = convert<std::uint64_t, std::uint32_t>();
  table["cvt.u32.u64"] = convert<std::uint32_t, std::uint64_t>();
  table["cvt.u16.u32"] = convert<std::uint16_t, std::uint32_t>();
  table["cvta.to.global.u64"] = convert<std::uint64_t, std::uint64_t>();
  table["cvt.rn.f32.s32"] = convert<float, std::int32_t>();
  table["cvt.rn.f32.f64"] = lanewise<float, double>([](double a) { return as_computed(static_cast<float>(a)); });
  table["cvt.f64.f32"] = convert<double, float>();
  table["cvt.sat.f32.f32"] = lanewise<float, float>([](float a) { return a > 0.0f ? std::fmin(a, 1.0f) : 0.0f; });
  table["cvt.f32.f16"] = lanewise<float, std::uint16_t>([](std::uint16_t a) { return as_computed(from_half(a)); });
  table["cvt.rn.f16.f32"] = lanewise<std::uint16_t, float>(to_half);
  table["cvt.rn.bf16.f32"] = lanewise<std::uint16_t, float>(to_bfloat16);
  table["cvt.rn.f16x2.f32"] = convert_pair<to_half>();
  table["cvt.rn.bf16x2.f32"] = convert_pair<to_bfloat16>();
}

void add_comparisons(Table& table) {
  add_order<std::int16_t>(table, "s16");
  add_order<std::int32_t>(table, "s32");
  add_order<std::uint32_t>(table, "u32");
  add_order<std::uint32_t>(table, "b32");
  add_order<std::int64_t>(table, "s64");
  add_order<float>(table, "f32");
  // With a u, true of a NaN.
  table["setp.nan.f32"] = lanewise<bool, float, float>([](float a, float b) { return a != a || b != b; });
  table["setp.neu.f32"] = lanewise<bool, float, float>([](float a, float b) { return !(a == b); });
  table["setp.leu.f32"] = lanewise<bool, float, float>([](float a, float b) { return !(a > b); });
  table["setp.geu.f32"] = lanewise<bool, float, float>([](float a, float b) { return !(a < b); });
}

}  // namespace ptx
