/* An NVML of one GPU, which a text file commands: lines of NAME VALUE, read again at every call.

   xid N: N is delivered once. lost 1: every query of the GPU fails. Other names are readings. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { void *handle; } *device_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { device_t device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } event_t;
enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10, IS_LOST = 15 };

static unsigned long long last_xid;

static unsigned long long commanded(const char *name, unsigned long long otherwise) {
    char word[64];
    unsigned long long value, found = otherwise;
    FILE *file = fopen(getenv("NVML_STUB"), "r");
    if (!file) return otherwise;
    while (fscanf(file, "%63s %llu", word, &value) == 2)
        if (!strcmp(word, name)) found = value;
    fclose(file);
    return found;
}

#define ASKED if (commanded("lost", 0)) return IS_LOST

int nvmlInitWithFlags(unsigned flags) { return commanded("absent", 0) ? 9 : SUCCESS; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == IS_LOST ? "GPU is lost" : "an error of the stub"; }
int nvmlSystemGetDriverVersion(char *to, unsigned size) { snprintf(to, size, "580.00.%llu", commanded("driver", 1)); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = commanded("count", 1); return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) { ASKED; *device = (device_t)0x10; return SUCCESS; }
int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device) {
    if (strcmp(uuid, "GPU-stub")) return NOT_FOUND;
    *device = (device_t)0x10;
    return SUCCESS;
}
int nvmlDeviceGetName(device_t device, char *to, unsigned size) { ASKED; snprintf(to, size, "Stub H100"); return SUCCESS; }
int nvmlDeviceGetUUID(device_t device, char *to, unsigned size) { snprintf(to, size, "GPU-stub"); return SUCCESS; }
int nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor) { *major = 9; *minor = 0; return SUCCESS; }
int nvmlDeviceGetMemoryInfo(device_t device, memory_t *memory) {
    ASKED;
    memory->total = commanded("total", 80ull << 30);
    memory->used = commanded("used", 1ull << 30);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts) { ASKED; *milliwatts = commanded("power", 650000); return SUCCESS; }
int nvmlDeviceGetTemperature(device_t device, int sensor, unsigned *degrees) { ASKED; *degrees = commanded("temperature", 61); return SUCCESS; }
int nvmlDeviceGetUtilizationRates(device_t device, utilization_t *rates) { ASKED; rates->gpu = commanded("utilization", 97); rates->memory = 0; return SUCCESS; }
int nvmlDeviceGetClockInfo(device_t device, int kind, unsigned *mhz) { ASKED; *mhz = commanded("clock", 1980); return SUCCESS; }
int nvmlDeviceGetCurrentClocksEventReasons(device_t device, unsigned long long *reasons) { ASKED; *reasons = commanded("reasons", 0); return SUCCESS; }
int nvmlDeviceGetTotalEccErrors(device_t device, int kind, int counter, unsigned long long *count) {
    ASKED;
    if (commanded("no_ecc", 0)) return NOT_SUPPORTED;
    *count = commanded(kind == 1 ? "uncorrected" : "corrected", 0);
    return SUCCESS;
}
int nvmlDeviceGetNvLinkState(device_t device, unsigned link, int *active) { *active = link < 2; return SUCCESS; }
int nvmlDeviceGetNvLinkErrorCounter(device_t device, unsigned link, int counter, unsigned long long *value) {
    ASKED;
    *value = link == 1 && counter == 0 ? commanded("nvlink", 0) : 0;
    return SUCCESS;
}
int nvmlDeviceGetRemappedRows(device_t device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    ASKED;
    *corrected = *uncorrected = *failed = 0;
    *pending = commanded("pending", 0);
    return SUCCESS;
}
int nvmlEventSetCreate(void **set) { *set = (void *)0x20; return SUCCESS; }
int nvmlEventSetFree(void *set) { return SUCCESS; }
int nvmlDeviceRegisterEvents(device_t device, unsigned long long types, void *set) { return commanded("no_events", 0) ? NOT_SUPPORTED : SUCCESS; }
int nvmlEventSetWait_v2(void *set, event_t *event, unsigned milliseconds) {
    unsigned long long xid = commanded("xid", 0);
    if (!xid || xid == last_xid) return TIMEOUT;
    last_xid = xid;
    event->device = (device_t)0x10;
    event->type = 8;
    event->data = xid;
    return SUCCESS;
}
