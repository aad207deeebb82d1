// A driver of one stream that keeps what it is given, and does all of it again for every launch, as a graph would.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>

typedef struct {
  char kind;
  _Atomic uint32_t* word;
  uint32_t value;
  void (*call)(void*);
  void* argument;
} Op;

static Op ops[1024];
static int count;

static int keep(Op op, void* stream) {
  if (count == 1024 || stream != (void*)0x7abc) return 1;
  ops[count++] = op;
  return 0;
}

int cuInit(unsigned flags) { return flags != 0; }

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

int cuMemHostGetDevicePointer(uint64_t* there, void* here, unsigned flags) {
  *there = (uint64_t)here;
  return flags != 0;
}

int cuStreamWriteValue32(void* stream, uint64_t address, uint32_t value, unsigned flags) {
  return flags ? 1 : keep((Op){'w', (void*)address, value, 0, 0}, stream);
}

int cuStreamWaitValue32(void* stream, uint64_t address, uint32_t value, unsigned flags) {
  return flags != 1 ? 1 : keep((Op){'?', (void*)address, value, 0, 0}, stream);
}

int cuLaunchHostFunc(void* stream, void (*call)(void*), void* argument) {
  return keep((Op){'c', 0, 0, call, argument}, stream);
}

int cuGetProcAddress_v2(const char* name, void** found, int version, uint64_t flags, int* status) {
  (void)version, (void)flags;
  *found = dlsym(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD), name);
  if (status) *status = !*found;
  return *found ? 0 : 500;
}

int cuGetProcAddress(const char* name, void** found, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, found, version, flags, 0);
}

// Graphs: of the one stream, captured by one thread for itself, whose handles are 'g' and 'e'.
static int capturing, spoiled, held;

int cuStreamBeginCapture_v2(void* stream, int mode) {
  if (capturing || stream != (void*)0x7abc || mode != 1) return 1;
  capturing = 1;
  spoiled = count = 0;
  return 0;
}

int cuStreamEndCapture(void* stream, void** graph) {
  if (!capturing || stream != (void*)0x7abc) return 1;
  capturing = 0;
  *graph = spoiled ? 0 : (void*)'g';
  held += !spoiled;
  return spoiled ? 901 : 0;
}

int cuGraphInstantiateWithFlags(void** ready, void* graph, unsigned long long flags) {
  if (graph != (void*)'g' || flags) return 1;
  *ready = (void*)'e';
  ++held;
  return 0;
}

int cuGraphExecDestroy(void* ready) { return ready == (void*)'e' ? --held < 0 : 1; }

int cuGraphDestroy(void* graph) { return graph == (void*)'g' ? --held < 0 : 1; }

int launch(void);

int cuGraphLaunch(void* ready, void* stream) {
  if (capturing || ready != (void*)'e' || stream != (void*)0x7abc) return 1;
  return launch() < 0;
}

// For the tests: what a stream is given may not be captured; and how many graphs of both kinds there are.
void spoil(void) { spoiled = 1; }
int graphs(void) { return held; }

// For the test: everything since the beginning, in order.
int launch(void) {
  for (Op* op = ops; op < ops + count; ++op) {
    if (op->kind == 'w') atomic_store(op->word, op->value);
    if (op->kind == '?')
      while (atomic_load(op->word) != op->value) {
      }
    if (op->kind == 'c') op->call(op->argument);
  }
  return count;
}
