"""Workloads in a child process, so that a kernel that crashes or hangs costs one provider only.

A faulting kernel leaves a CUDA context in which nothing works any more. The child is then replaced,
the provider that was at work is reported as broken, and the workload runs again without it.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

from bench.measure import clock_for
from bench.providers import Provider
from bench.runner import Write, run_workload
from bench.workloads import Workload


class Worker:
    """Runs workloads one at a time in a child process, which is started when first needed."""

    def __init__(self, device: str, *, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def run(
        self, workload: Workload, providers: list[Provider], write: Write, *, timeout: float
    ) -> None:
        """Run one workload within ``timeout`` seconds, and write its records.

        A provider during which the child dies, or is silent until the time is up, is reported as
        broken. Without time left for another attempt the rest of the workload is given up.

        Raises:
            RuntimeError: If the child failed before any provider was at work.
        """
        deadline = time.monotonic() + timeout
        left = list(providers)
        while left:
            failure = self._attempt(workload, left, write, deadline)
            if failure is None:
                return
            blamed, reason = failure
            if blamed is None:
                raise RuntimeError(f"{workload.name}: {reason}")
            write(_broken(workload, next(p for p in left if p.name == blamed), reason))
            left = [provider for provider in left if provider.name != blamed]
            if time.monotonic() >= deadline:
                return

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attempt(
        self, workload: Workload, providers: list[Provider], write: Write, deadline: float
    ) -> tuple[str | None, str] | None:
        """``None`` if all went well, else who was at work, if anyone, and what happened."""
        pipe = self._start()
        pipe.send((workload, providers))
        trying = None
        while pipe.poll(max(0.0, deadline - time.monotonic())):
            try:
                kind, content = pipe.recv()
            except (EOFError, ConnectionResetError):
                self.close()
                return trying, "the process died while it was at work"
            if kind == "trying":
                trying = content
            elif kind == "record":
                write(content)
            elif kind == "done":
                return None
            else:
                self.close()
                return trying, content
        self.close()
        return trying, "it did not return before the time was up"

    def _start(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._device, self._seconds), daemon=True
            )
            self._process.start()
            theirs.close()
        return self._pipe


def _serve(pipe: Connection, device: str, seconds: float) -> None:
    """The child: answer every workload with its records, then ``done``."""
    clock = clock_for(device)
    while True:
        try:
            workload, providers = pipe.recv()
        except EOFError:
            return
        try:
            run_workload(
                workload,
                providers,
                device,
                clock,
                lambda record: pipe.send(("record", record)),
                seconds=seconds,
                trying=lambda provider: pipe.send(("trying", provider)),
            )
        # The parent decides what to do about it, and replaces this process.
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
            return
        pipe.send(("done", None))


def _broken(workload: Workload, provider: Provider, reason: str) -> dict:
    return {
        "kind": "result",
        "workload": workload.as_record(),
        "provider": provider.name,
        "side": provider.side,
        "status": "broken",
        "reasons": [reason],
    }
