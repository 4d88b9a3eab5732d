// Runs AMX instructions on a CPU that has none: each raises SIGILL, whose handler decodes it, does on the model what it
// says, and goes on behind it. So compiled code is tested: registers, addresses, strides, the order of operands.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels/amx_model.h"

namespace traps {

inline thread_local prunekernels::TileModel tiles;
inline int64_t count = 0;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::_Exit(1);
}

// An instruction VEX.128 map 0F38 W0: prefix, opcode, operands.
class Instruction {
 public:
  Instruction(const uint8_t* at, const greg_t* registers) : at_(at), registers_(registers) {
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0) fail("an illegal instruction that is none of AMX");
    length_ = 5;  // up to ModRM
    if (!is_register() && rm() == 4) ++length_;
    const bool relative = mod() == 0 && (rm() == 5 || (rm() == 4 && (at[5] & 7) == 5));
    if (mod() == 1) length_ += 1;
    if (mod() == 2 || relative) length_ += 4;
  }
  int prefix() const { return at_[2] & 3; }  // none, 66, F3, F2
  int opcode() const { return at_[3]; }
  bool is_register() const { return mod() == 3; }
  bool has_sib() const { return !is_register() && rm() == 4; }
  int reg() const { return (at_[4] >> 3 & 7) | (at_[1] & 0x80 ? 0 : 8); }
  int rm_register() const { return rm() | (at_[1] & 0x20 ? 0 : 8); }
  int third() const { return ~(at_[2] >> 3) & 15; }
  int length() const { return length_; }

  char* start() const { return reinterpret_cast<char*>(base() + displacement()); }  // without the index
  char* address() const { return start() + (has_sib() ? stride() : 0); }
  int64_t stride() const {
    const int index = (at_[5] >> 3 & 7) | (at_[1] & 0x40 ? 0 : 8);
    return index == 4 ? 0 : value(index) * (1 << (at_[5] >> 6));
  }

 private:
  int mod() const { return at_[4] >> 6; }
  int rm() const { return at_[4] & 7; }
  int64_t base() const {
    if (!has_sib()) return mod() == 0 && rm() == 5 ? registers_[REG_RIP] + length_ : value(rm_register());
    const int number = at_[5] & 7;
    return mod() == 0 && number == 5 ? 0 : value(number | (at_[1] & 0x20 ? 0 : 8));
  }
  int64_t displacement() const {
    const uint8_t* const from = at_ + (has_sib() ? 6 : 5);
    if (mod() == 1) return static_cast<int8_t>(*from);
    int32_t wide = 0;
    if (at_ + length_ - from == 4) std::memcpy(&wide, from, sizeof(wide));
    return wide;
  }
  int64_t value(int number) const {
    constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kPlaces[number]];
  }

  const uint8_t* const at_;
  const greg_t* const registers_;
  int length_;
};

inline void execute(const Instruction& i) {
  const int kind = i.opcode() << 2 | i.prefix();
  switch (kind) {
    case 0x49 << 2 | 0:
      if (i.is_register()) return tiles.release();
      prunekernels::TileConfig config;
      std::memcpy(&config, i.address(), sizeof(config));
      return tiles.configure(config);
    case 0x49 << 2 | 1:
      std::memcpy(i.address(), &tiles.configuration(), sizeof(config));
      return;
    case 0x49 << 2 | 3:
      return tiles.zero(i.reg());
    case 0x4b << 2 | 1:
    case 0x4b << 2 | 3:
      if (!i.has_sib()) fail("a tile that is not addressed by base and index");
      return tiles.load(i.reg(), i.start(), i.stride());
    case 0x4b << 2 | 2:
      if (!i.has_sib()) fail("a tile that is not addressed by base and index");
      return tiles.store(i.reg(), i.start(), i.stride());
    case 0x5c << 2 | 2:
      return tiles.dot(i.reg(), i.rm_register(), i.third());
    default:
      fail("an illegal instruction that is none of AMX");
  }
}

inline void handle(int, siginfo_t*, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction instruction(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  try {
    execute(instruction);
  } catch (const std::logic_error& error) {
    fail(error.what());
  }
  registers[REG_RIP] += instruction.length();
  ++count;
}

inline void install() {
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace traps
