// Products of small matrices by a warp, and the loads that bring them operands turned over. How a matrix lies in a warp's registers is
// taken from PTX's manual, not from the kernels.
#include <algorithm>

#include "instructions.h"

namespace ptx {

namespace {

// d (16, 8) = a (16, K) b (K, 8) + c (16, 8). Lane 4 i + q holds, where r and k are the register's own bits,
//   a: row i + 8 (r % 2), columns 2 q and 2 q + 1, + 8 (r / 2)      b: rows 2 q and 2 q + 1, + 8 r, column i
//   c, d: row i + 8 (r / 2), column 2 q + r % 2
// An unknown number spoils its row, or its column: what nobody takes of the result may be spoilt.
//
// Summed in double and rounded once. Real tensor cores cut sums off; the emulator of test_cuda_emulated.py does as they do.
template <int K, float (*widen)(std::uint16_t)>
Outcome multiply(Warp& warp, const Instruction& instruction, Lanes lanes) {
  if (lanes != kAllLanes) return Outcome::kWaitForLanes;
  constexpr int kOfA = K / 4, kOfB = K / 8;
  double a[16][K], b[K][8], sum[16][8];
  bool unknown_row[16] = {}, unknown_column[8] = {}, unknown[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int i = lane / 4, q = lane % 4;
    const auto word = [&](int operand) { return static_cast<std::uint32_t>(warp.values(instruction.sources[operand])[lane]); };
    const auto is_unknown = [&](int operand) { return (warp.unknown(instruction.sources[operand]).either() >> lane & 1) != 0; };
    for (int r = 0; r < kOfA; ++r) {
      const int row = i + 8 * (r % 2), column = 2 * q + 8 * (r / 2);
      a[row][column] = widen(word(r) & 0xffff), a[row][column + 1] = widen(word(r) >> 16);
      unknown_row[row] |= is_unknown(r);
    }
    for (int r = 0; r < kOfB; ++r) {
      const int row = 2 * q + 8 * r;
      b[row][i] = widen(word(kOfA + r) & 0xffff), b[row + 1][i] = widen(word(kOfA + r) >> 16);
      unknown_column[i] |= is_unknown(kOfA + r);
    }
    for (int r = 0; r < 4; ++r) {
      const int row = i + 8 * (r / 2), column = 2 * q + r % 2;
      sum[row][column] = number_of<float>(word(kOfA + kOfB + r));
      unknown[row][column] = is_unknown(kOfA + kOfB + r);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
  for (int r = 0; r < 4; ++r) {
    const int to = instruction.destinations[r];
    Lanes spoilt = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
      warp.values(to)[lane] = bits_of(as_computed(static_cast<float>(sum[row][column])));
      spoilt |= static_cast<Lanes>(unknown_row[row] || unknown_column[column] || unknown[row][column]) << lane;
    }
    warp.set_unknown(to, lanes, {spoilt, spoilt});
  }
  return Outcome::kNext;
}

// Four matrices of 8 x 8 16-bit numbers: row r of matrix m from where lane 8 m + r says; lane 4 i + q receives column i of the rows 2 q and
// 2 q + 1 of each.
Outcome load_transposed(Warp& warp, const Instruction& instruction, Lanes lanes) {
  if (lanes != kAllLanes) return Outcome::kWaitForLanes;
  warp.require_known(instruction, instruction.sources[0], lanes, "is an address");
  SharedMemory& shared = warp.block().shared;
  std::array<std::uint64_t, kWarpSize> addresses;  // whose register may receive a matrix
  std::copy_n(warp.values(instruction.sources[0]), kWarpSize, addresses.begin());
  for (int matrix = 0; matrix < 4; ++matrix) {
    SharedMemory::Value words[8][4];
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      const Access access = warp.access(instruction, lane);
      const auto from = static_cast<std::uint32_t>(addresses[lane] + instruction.offsets[0]);
      shared.check(access, from, 16);
      for (int k = 0; k < 4; ++k) words[row][k] = shared.read(access, from + 4 * k, kAllLanes);
    }
    const int to = instruction.destinations[matrix];
    Unknown unknown{0, 0};
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int column = lane / 4, low = 2 * (lane % 4), shift = 16 * (column % 2);
      const auto is_unknown = [&](const SharedMemory::Value& word) { return column % 2 == 0 ? word.low_unknown : word.high_unknown; };
      const SharedMemory::Value first = words[low][column / 2], second = words[low + 1][column / 2];
      warp.values(to)[lane] = (first.bits >> shift & 0xffff) | (second.bits >> shift & 0xffff) << 16;
      unknown.low |= Lanes{is_unknown(first)} << lane, unknown.high |= Lanes{is_unknown(second)} << lane;
    }
    warp.set_unknown(to, lanes, unknown);
  }
  return Outcome::kNext;
}

}  // namespace

void add_tensor_cores(Table& table) {
  table["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = {Form::kDestination, multiply<16, from_bfloat16>};
  table["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = {Form::kDestination, multiply<16, from_half>};
  table["mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32"] = {Form::kDestination, multiply<8, from_bfloat16>};
  table["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"] = {Form::kLoad, load_transposed};
}

}  // namespace ptx
