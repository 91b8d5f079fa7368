"""The runner's side of the conversation: a process per engine, asked line by line.

See ``peers/protocol.py`` for the other side. Nothing but the standard library here: a
child's peak memory is never reported below its parent's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rows import ROOT

__all__ = ["OURS", "EngineError", "Worker", "scratch_environment", "wait"]

OURS = "jaxglmm"
R_PEERS = ("lme4", "glmmTMB")


class EngineError(Exception):
    """An engine gave no answer; the message is its status."""


@contextmanager
def scratch_environment() -> Iterator[dict[str, str]]:
    """Environment with an empty folder for compiled programs, and this checkout."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, JAXGLMM_CACHE_DIR=folder)
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAXGLMM_CACHE", "JAX_ENABLE_X64"):
            environment.pop(name, None)
        paths = [str(ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        yield environment


class Worker:
    """An engine's process, asked one line at a time."""

    def __init__(
        self, engine: str, peer_python: str, timeout: float, environment: dict[str, str]
    ):
        self.timeout = timeout
        self.spent = 0.0
        self.expired = False
        self.errors = tempfile.TemporaryFile("w+")
        try:
            self.process = subprocess.Popen(
                worker_command(engine, peer_python), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=self.errors, text=True,
                env=environment if engine.startswith(OURS) else None,
            )  # fmt: skip
        except OSError as error:
            self.errors.close()
            raise EngineError("not installed") from error

    def ask(self, request: dict) -> dict:
        """Send one record and wait for the answer."""
        timer = threading.Timer(self.timeout, self._expire)
        timer.start()
        start = time.perf_counter()
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return self._answer()
        except BrokenPipeError:
            raise EngineError(self._complaint()) from None
        finally:
            timer.cancel()
            self.spent += time.perf_counter() - start

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise EngineError(self._complaint())

    def _expire(self) -> None:
        self.expired = True
        self.process.kill()

    def _complaint(self) -> str:
        if self.expired:
            return f"no answer in {self.timeout:g} s"
        self.errors.seek(0)
        lines = [x.strip() for x in self.errors if x.strip()]
        return "failed: " + (lines[-1][:200] if lines else "no message")

    def stop(self) -> float | None:
        """Peak memory of the process in MB."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                pass
        self.errors.close()
        return wait(self.process, self.timeout)[1]


def worker_command(engine: str, peer_python: str) -> list[str]:
    folder = Path(__file__).resolve().parent / "peers"
    if engine.startswith(OURS):
        return [sys.executable, str(folder / "jaxglmm_engines.py")]
    if engine in R_PEERS:
        return ["Rscript", "--vanilla", str(folder / "r_peers.R")]
    return [peer_python, str(folder / "python_peers.py")]


def wait(process: subprocess.Popen, timeout: float) -> tuple[int, float | None]:
    """Exit status and peak memory in MB of a process that is about to end."""
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    try:
        if not hasattr(os, "wait4"):
            return process.wait(), None
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return process.returncode, usage.ru_maxrss / unit
