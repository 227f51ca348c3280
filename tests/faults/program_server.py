"""Runs programs of scripts/, each in a forked child: program_server.py MODULES..., started with fault_at.so preloaded.

The modules are imported once, so that a run costs milliseconds. Each line of standard input is a JSON request, see
`system_calls.Server`; a line of standard output answers it with how the run ended.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import sys
from importlib import import_module
from typing import Any, NoReturn

PATIENCE_SECONDS = 300  # a longer run counts as hung: SIGALRM ends it


def main() -> None:
    library = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
    library.fault_path.restype = ctypes.c_char_p
    for module in sys.argv[1:]:
        import_module(module)
    gc.freeze()  # a child's garbage collection would copy the memory of all imported modules
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run_here(library, request)
        _, status = os.waitpid(child, 0)
        library.fault_disarm()
        ended = {
            "code": os.waitstatus_to_exitcode(status),
            "counts": [library.fault_count(kind) for kind in range(request["kinds"])],
            "path": os.fsdecode(library.fault_path()),
        }
        print(json.dumps(ended), flush=True)


def run_here(library: ctypes.CDLL, request: dict[str, Any]) -> NoReturn:
    signal.alarm(PATIENCE_SECONDS)
    nothing = os.open(os.devnull, os.O_RDWR)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, descriptor in enumerate((nothing, log, log)):
        os.dup2(descriptor, number)
    sys.argv = [request["script"], *request["arguments"]]
    library.fault_arm(os.fsencode(request["folder"]), *request["fault"])
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        if request["fault"][1]:
            raise  # so that Python exits as in the program itself
        os._exit(int(end.code or 0))  # Python's exit takes longer than the program's own work
    raise AssertionError(f"{request['script']} has not called sys.exit")


if __name__ == "__main__":
    main()
