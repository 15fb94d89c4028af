"""A Python that has imported torch and Braid's trainer, and forks: `python -m MODULE` without the seconds of importing.

    python warm_python.py MODULE ...         imports the modules named, then reads requests from its standard input

A request is a line of JSON: its `number`, `argv` (what would stand after `python`: `-m MODULE WORDS` or
`SCRIPT WORDS`), `cwd`, `env` (the whole environment), `stdout` and `stderr` (files). The child it forks runs that as
`__main__`: a process like any other, with its own process id, signals, locks and exit code. Only taking the interpreter
apart at the end is left out, which costs a second with torch in it. Answers are lines too: `["started", number, pid]`,
and `["ended", number, exit code]` when that child is gone (minus the signal for one that was killed).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import sys
import traceback
from collections.abc import Iterable


def serve() -> list[str]:
    """Fork for each request until standard input ends. Returns in the children alone, with their arguments."""
    running: dict[int, tuple[int, int]] = {}  # pidfd -> number of the request, process id
    requests = sys.stdin.fileno()
    buffered = b""
    while True:
        readable, _, _ = select.select([requests, *running], [], [])
        for pidfd in set(readable) - {requests}:
            number, pid = running.pop(pidfd)
            os.close(pidfd)
            print(json.dumps(["ended", number, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]), flush=True)
        if requests not in readable:
            continue
        received = os.read(requests, 1 << 20)
        if not received:
            sys.exit()
        *lines, buffered = (buffered + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                become(request, running)
                return request["argv"]
            running[os.pidfd_open(pid)] = request["number"], pid
            print(json.dumps(["started", request["number"], pid]), flush=True)


def run_as_main(argv: list[str]) -> int:
    """What `python ARGV` does once it has started; its exit code."""
    sys.argv = argv
    try:
        if argv[0] == "-m":
            del argv[0]
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return int(isinstance(stop.code, str)) if not isinstance(stop.code, int) else stop.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def become(request: dict, inherited: Iterable[int]) -> None:
    """Make this child the process that was asked for: environment, directory, streams, arguments."""
    os.setpgid(0, 0)  # a Ctrl-C at the test runner's terminal is not one at this process's
    for pidfd in inherited:
        os.close(pidfd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    opened = [
        os.open(os.devnull, os.O_RDONLY),
        os.open(request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ]
    for stream, file in enumerate(opened):
        os.dup2(file, stream)
        os.close(file)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # some say hello; standard output is for answers
        for name in sys.argv[1:]:
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    gc.freeze()  # else the children's first collection would write to, and so copy, every page
    code = run_as_main(serve())
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
