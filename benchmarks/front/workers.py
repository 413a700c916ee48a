# SPDX-License-Identifier: Apache-2.0
"""Tasks done by a few processes at a time; one that dies takes nothing with it but its own task."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")
Task = tuple[Any, ...]


class Died(Exception):
    """A task's process ended without an answer."""


def _serve(act: Callable[..., Any], pipe: Connection) -> None:
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(act(*task))
        except Exception as error:
            pipe.send(error)


@dataclass
class _Worker:
    """A process and what it is at."""

    act: Callable[..., Any]
    task: Task | None = None
    pipe: Connection = field(init=False)

    def __post_init__(self) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(self.act, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """Of the task, an exception where it raised one or died of it."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return Died(f"the process died with exit code {self.process.exitcode}")

    def end(self) -> None:
        """One that waits ends by itself, and clears up behind it; one that is busy is killed."""
        self.pipe.close()
        if self.task is not None:
            self.process.terminate()
        self.process.join()


class Workers:
    """``act(*task)`` for every task that is put, in order, by as many processes as there are ``jobs``."""

    def __init__(self, act: Callable[..., Any], jobs: int) -> None:
        self.act, self.jobs = act, jobs
        self.waiting: deque[Task] = deque()
        self.workers: list[_Worker] = []

    def put(self, *task: Any) -> None:
        self.waiting.append(task)

    def answers(self) -> Iterator[tuple[Task, Any]]:
        """(task, what came of it) as they end, until nothing is left; more may be put meanwhile."""
        try:
            while self.waiting or any(worker.task for worker in self.workers):
                self._hand_out()
                busy = {worker.pipe: worker for worker in self.workers if worker.task}
                for pipe in wait(list(busy)):
                    worker = busy[pipe]  # type: ignore[index]
                    task, answer = worker.task, worker.answer()
                    worker.task = None
                    if isinstance(answer, Died):
                        self.workers.remove(worker)
                    assert task is not None
                    yield task, answer
        finally:
            for worker in self.workers:
                worker.end()

    def _hand_out(self) -> None:
        while self.waiting and len(self.workers) < self.jobs:
            self.workers.append(_Worker(self.act))
            self.workers[-1].task = self.waiting.popleft()
            self.workers[-1].pipe.send(self.workers[-1].task)
        for worker in self.workers:
            if worker.task is None and self.waiting:
                worker.task = self.waiting.popleft()
                worker.pipe.send(worker.task)
