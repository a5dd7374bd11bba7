"""Processes that begin with torch and transformers imported: forks of one that has imported them.

Importing them takes 5 s of a processor, and hundreds of tests run a command in a process of its
own. Where the start itself is what is tested, `subprocess` starts a fresh interpreter instead.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parent.parent
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class ForkedProcess:
    """Like `subprocess.Popen` in text mode, for a module (`-m NAME`) or a file of Python.

    `stdin` is an open file, PIPE, or None for no input; stdout and stderr are pipes.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdin: TextIO | int | None = None,
    ) -> None:
        self.args = arguments
        self.returncode: int | None = None
        theirs, mine = zip(os.pipe(), os.pipe()[::-1], os.pipe()[::-1], strict=True)
        (given, out, err), (write, self_out, self_err) = theirs, mine
        if stdin is None:
            source = os.open(os.devnull, os.O_RDONLY)
        elif isinstance(stdin, int):
            source = os.dup(given)
        else:
            source = os.dup(stdin.fileno())
        os.close(given)
        self.stdin = os.fdopen(write, "w") if stdin == subprocess.PIPE else None
        if self.stdin is None:
            os.close(write)
        self.stdout, self.stderr = os.fdopen(self_out), os.fdopen(self_err)
        fds = [source, out, err]
        environment = dict(os.environ if env is None else env)
        self._server, self.pid = _ask(server(), arguments, environment, cwd or Path.cwd(), fds)
        for fd in fds:
            os.close(fd)

    def poll(self) -> int | None:
        with contextlib.suppress(TimeoutError):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._server.settimeout(timeout if timeout != 0 else 0.001)
            answer = _received(self._server)
            self.returncode = int.from_bytes(answer, "big", signed=True)
            self._server.close()
        return self.returncode

    def communicate(self, text: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        said: dict[str, str] = {}

        def read(name: str, stream: TextIO) -> None:
            said[name] = stream.read()

        readers = [
            threading.Thread(target=read, args=(name, stream), daemon=True)
            for name, stream in (("out", self.stdout), ("err", self.stderr))
            if not stream.closed
        ]
        for reader in readers:
            reader.start()
        if self.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(text or "")
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        until = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.join(None if until is None else max(0, until - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if until is None else max(0.1, until - time.monotonic()))
        self.stdout.close()
        self.stderr.close()
        return said.get("out", ""), said.get("err", "")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    arguments: list[str],
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    text: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end, like `subprocess.run` with captured output."""
    process = ForkedProcess(
        arguments, env=env, cwd=cwd, stdin=None if text is None else subprocess.PIPE
    )
    out, err = process.communicate(text)
    assert process.returncode is not None
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def program(folder: Path, *arguments: str) -> Path:
    """A program `kscli` in `folder` that has itself forked, for what starts commands by itself.

    `arguments` are what is run, `-m kscli` where there are none.
    """
    path = folder / "kscli"
    own = " ".join(arguments or ("-m", "kscli"))
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {server()} {own} "$@"\n')
    path.chmod(0o755)
    return path


def _ask(
    address: str, arguments: list[str], environment: dict[str, str], folder: Path, fds: list[int]
) -> tuple[socket.socket, int]:
    """Have a process forked, with stdin, stdout and stderr; the connection, and its id."""
    request = {"arguments": arguments, "environment": environment, "folder": str(folder)}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    message = json.dumps(request).encode()
    socket.send_fds(connection, [len(message).to_bytes(4, "big")], fds)
    connection.sendall(message)
    return connection, int.from_bytes(_received(connection), "big")


def _received(connection: socket.socket) -> bytes:
    """A number from the process that forks; EOFError where that has ended."""
    answer = connection.recv(4, socket.MSG_WAITALL)
    if len(answer) < 4:
        raise EOFError("the process that forks has ended")
    return answer


def _stand_in(address: str, arguments: list[str]) -> int:
    """Be the process that is forked: the same streams, signals and exit status."""
    connection, pid = _ask(address, arguments, dict(os.environ), Path.cwd(), [0, 1, 2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int.from_bytes(_received(connection), "big", signed=True)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


@cache
def server() -> str:
    """The address of the process that forks, started by the first test that asks."""
    folder = tempfile.mkdtemp(prefix="fork")
    address = f"{folder}/socket"
    server = subprocess.Popen(
        [sys.executable, __file__, address],
        stdout=subprocess.PIPE,
        env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "FATAL"},
        # Ctrl-C in the terminal is pytest's.
        start_new_session=True,
    )
    # Waited for, so that its processor time counts as the tests'.
    atexit.register(lambda: (server.kill(), server.wait()))
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return address


# The process that forks. It stays without threads, so that its forks may have some.


def serve(address: str) -> None:
    """Fork a child for every connection; send its process id, and in the end its exit status.

    Where the other side is gone before the child has ended, as when it was killed, so is the child.
    """
    _import_what_commands_use()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    ended, wake = socket.socketpair()
    ended.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    print("ready", flush=True)
    children: dict[int, socket.socket] = {}
    asked: dict[Any, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listening:
                    connection, _ = listening.accept()
                    asked[connection] = pid = _fork(connection)
                    children[pid] = connection
                    selector.register(connection, selectors.EVENT_READ)
                elif key.fileobj is ended:
                    ended.recv(4096)
                else:
                    selector.unregister(key.fileobj)
                    os.kill(asked[key.fileobj], signal.SIGKILL)
            _report(children, selector)


def _report(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with children.pop(pid) as connection, contextlib.suppress(OSError):
            with contextlib.suppress(KeyError):
                selector.unregister(connection)
            code = os.waitstatus_to_exitcode(status)
            connection.sendall(code.to_bytes(4, "big", signed=True))


def _fork(connection: socket.socket) -> int:
    head, fds, _, _ = socket.recv_fds(connection, 4, 3)
    size, message = int.from_bytes(head, "big"), b""
    while len(message) < size:
        message += connection.recv(size - len(message))
    pid = os.fork()
    if pid:
        for fd in fds:
            os.close(fd)
        # Where the other side is gone, `serve` ends the child.
        with contextlib.suppress(OSError):
            connection.sendall(pid.to_bytes(4, "big"))
        return pid
    code = 1
    try:
        code = _child(fds, json.loads(message))
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _child(fds: list[int], request: dict[str, Any]) -> int:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for fd, place in zip(fds, (0, 1, 2), strict=True):
        os.dup2(fd, place)
    os.closerange(3, 256)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = os.fdopen(0)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), encoding=encoding)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb"), line_buffering=True)
    first, *rest = request["arguments"]
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            # As the interpreter ends.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def _import_what_commands_use() -> None:
    import torch.distributed
    from transformers import (  # noqa: F401
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    import kscli.cli.app
    import kscli.corpus
    import kscli.editing.stage
    import kscli.extraction
    import kscli.pipeline
    import kscli.pmatrix
    import kscli.second_moment.covariance
    import kscli.tiny.corpus  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(_stand_in(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
