/* Preloaded into every process of a command, so that all libraries in it see a processor without AVX-512, AMX and
 * the VNNI instructions: the kernel is asked to trap the instruction that tells them what the processor has
 * (arch_prctl(2), ARCH_SET_CPUID), and the trap answers with fewer bits. Nothing else changes; in particular not
 * the speed of what they then choose. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012, BYTES_OF_CPUID = 2 };

typedef int (*Sigaction)(int, const struct sigaction*, struct sigaction*);

/* What the program itself wants to do about SIGSEGV. */
static struct sigaction theirs;

static Sigaction real_sigaction(void) {
  static Sigaction real;
  if (real == NULL) *(void**)&real = dlsym(RTLD_NEXT, "sigaction");
  return real;
}

static int allow_cpuid(long allowed) { return (int)syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

struct Registers {
  uint32_t a, b, c, d;
};

static struct Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  struct Registers r;
  allow_cpuid(1);
  __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(subleaf));
  allow_cpuid(0);
  return r;
}

static uint32_t bits(const int* numbers, size_t count) {
  uint32_t all = 0;
  for (size_t i = 0; i < count; ++i) all |= UINT32_C(1) << numbers[i];
  return all;
}
#define BITS(...) bits((const int[]){__VA_ARGS__}, sizeof((int[]){__VA_ARGS__}) / sizeof(int))

/* The Intel SDM, volume 2A, table 3-8, has the numbers. */
static struct Registers masked(uint32_t leaf, uint32_t subleaf) {
  struct Registers r = cpuid(leaf, subleaf);
  if (leaf == 7 && subleaf == 0) {
    r.b &= ~BITS(16, 17, 21, 26, 27, 28, 30, 31);  /* AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL */
    r.c &= ~BITS(1, 6, 11, 12, 14);                /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    r.d &= ~BITS(2, 3, 8, 22, 23, 24, 25);         /* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX BF16, FP16, TILE, INT8 */
  } else if (leaf == 7) {
    r.a &= ~BITS(4, 5, 21, 23);     /* AVX-VNNI, AVX-512 BF16, AMX FP16, AVX-IFMA */
    r.d &= ~BITS(4, 5, 8, 10, 19);  /* AVX-VNNI INT8, NE-CONVERT, AMX COMPLEX, AVX-VNNI INT16, AVX10 */
  } else if (leaf == 13 && subleaf == 0) {
    r.a &= ~BITS(5, 6, 7, 17, 18); /* states of AVX-512 and AMX that the system saves */
  } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
    memset(&r, 0, sizeof r); /* tiles of AMX, AVX10 */
  }
  return r;
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  greg_t* g = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* code = (const uint8_t*)g[REG_RIP];
  if (info->si_code == SI_KERNEL && code[0] == 0x0f && code[1] == 0xa2) {
    const struct Registers r = masked((uint32_t)g[REG_RAX], (uint32_t)g[REG_RCX]);
    g[REG_RAX] = r.a;
    g[REG_RBX] = r.b;
    g[REG_RCX] = r.c;
    g[REG_RDX] = r.d;
    g[REG_RIP] += BYTES_OF_CPUID;
  } else if (theirs.sa_flags & SA_SIGINFO) {
    theirs.sa_sigaction(signal, info, context);
  } else if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) {
    theirs.sa_handler(signal);
  } else { /* the same fault again, and its usual end */
    const struct sigaction usual = {.sa_handler = SIG_DFL};
    real_sigaction()(SIGSEGV, &usual, NULL);
    if (info->si_code <= 0) raise(signal); /* sent by a process: it does not come again by itself */
  }
}

/* Programs may set handlers of their own, which then come behind ours. */
int sigaction(int signal, const struct sigaction* action, struct sigaction* old) {
  if (signal != SIGSEGV) return real_sigaction()(signal, action, old);
  if (old != NULL) *old = theirs;
  if (action != NULL) theirs = *action;
  return 0;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  real_sigaction()(SIGSEGV, &ours, &theirs);
  if (allow_cpuid(0) != 0) {
    fputs("this system cannot hide what its processor has (arch_prctl ARCH_SET_CPUID)\n", stderr);
    exit(2);
  }
}
