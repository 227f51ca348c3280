"""C code put before the system's calls of a process, so that they fail as on a broken or unusual file system."""

import os
import subprocess
from pathlib import Path

# Every flock and every fcntl lock fails with the errno of LOCK_ERRNO.
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


def preloaded(source: str, folder: Path, **variables: object) -> dict[str, str]:
    """Compile C code; return an environment in which processes start with it, and with the variables."""
    code, library = folder / "preload.c", folder / "preload.so"
    code.write_text(source)
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", library, code, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), **{key: str(value) for key, value in variables.items()}}
