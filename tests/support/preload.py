"""C code that replaces system calls of a process, so that they fail as on a broken or unusual file system."""

import os
import subprocess
from pathlib import Path

# Every flock and every fcntl lock fails with the errno LOCK_ERRNO.
NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>

static int refused(void) { errno = atoi(getenv("LOCK_ERRNO")); return -1; }
static int is_lock(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}
int flock(int file, int operation) { return refused(); }
#define FCNTL(name) \\
    int name(int file, int command, ...) { \\
        va_list rest; \\
        va_start(rest, command); \\
        void *argument = va_arg(rest, void *); \\
        va_end(rest); \\
        if (is_lock(command)) return refused(); \\
        return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, #name))(file, command, argument); \\
    }
FCNTL(fcntl)
FCNTL(fcntl64)
"""

# FAULT_CALL calls on files whose path contains FAULT_FILE fail with FAULT_ERRNO, from number FAULT_FROM on.
FAILING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int calls;
static int fails(const char *call, int file) {
    char link[64], path[4096];
    if (strcmp(call, getenv("FAULT_CALL"))) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, getenv("FAULT_FILE")) || ++calls < atoi(getenv("FAULT_FROM"))) return 0;
    return 1;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
int fsync(int file) {
    if (fails("fsync", file)) { errno = atoi(getenv("FAULT_ERRNO")); return -1; }
    return REAL(fsync)(file);
}
ssize_t write(int file, const void *data, size_t size) {
    if (fails("write", file)) { errno = atoi(getenv("FAULT_ERRNO")); return -1; }
    return REAL(write)(file, data, size);
}
int close(int file) {
    if (fails("close", file)) { REAL(close)(file); errno = atoi(getenv("FAULT_ERRNO")); return -1; }
    return REAL(close)(file);
}
"""


def preloaded(source: str, folder: Path, **variables: object) -> dict[str, str]:
    """Compile C code; return an environment that preloads it into processes and has these variables.

    What this process preloads stays first: a sanitizer must be.
    """
    code, library = folder / "preload.c", folder / "preload.so"
    code.write_text(source)
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", library, code, "-ldl"], check=True)
    libraries = f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()
    return {**os.environ, "LD_PRELOAD": libraries, **{key: str(value) for key, value in variables.items()}}
