#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <system_error>
#include <vector>

#if !defined(__x86_64__) || defined(SEQKERN_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace seqkern::emulator {

void* stack(size_t i) {
  static std::vector<void*> stacks;
  while (stacks.size() <= i) {
    const auto guard = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    void* p = ::mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || ::mprotect(p, guard, PROT_NONE) != 0) {
      throw std::system_error(errno, std::generic_category(), "emulator: stack of a thread");
    }
    stacks.push_back(static_cast<char*>(p) + guard);
  }
  return stacks[i];
}

#if defined(__x86_64__) && !defined(SEQKERN_EMULATOR_UCONTEXT)

// The registers a function must preserve go on the stack, and the stack pointer into the context.
// SSE control words are left alone: nothing here changes them.
asm(R"(
.text
.local seqkern_emulator_switch
.type seqkern_emulator_switch, @function
seqkern_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size seqkern_emulator_switch, .-seqkern_emulator_switch
)");
extern "C" void seqkern_emulator_switch(void** from, void** to);

void prepare(Context& context, void* stack, void (*entry)()) {
  constexpr int kSaved = 6;
  auto* top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStackBytes);
  // At entry the stack pointer is 8 past a multiple of 16, as after a call; the zero above it ends
  // a debugger's backtrace.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSaved; ++i) *--top = nullptr;
  context.sp = top;
}

void switch_context(Context& from, Context& to) { seqkern_emulator_switch(&from.sp, &to.sp); }

#else

// Slower (a system call per switch), and everywhere. The ucontext lies at the low end of the stack.
void prepare(Context& context, void* stack, void (*entry)()) {
  auto* u = static_cast<ucontext_t*>(stack);
  ::getcontext(u);
  u->uc_stack.ss_sp = u + 1;
  u->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  u->uc_link = nullptr;
  ::makecontext(u, entry, 0);
  context.sp = u;
}

void switch_context(Context& from, Context& to) {
  static ucontext_t host;
  if (from.sp == nullptr) from.sp = &host;
  ::swapcontext(static_cast<ucontext_t*>(from.sp), static_cast<ucontext_t*>(to.sp));
}

#endif

}  // namespace seqkern::emulator
