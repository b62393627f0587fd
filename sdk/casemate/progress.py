"""What a person sees while a job runs: one bar with step and planned epsilon, and where it is simulated, that word."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from casemate_schemas.api import JobStatus
from casemate_schemas.job_state import JobEvent
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as _RichProgress


class Progress:
    """A live bar for one job; a context manager."""

    def __init__(self, job_id: str, *, simulation: bool, console: Console | None = None) -> None:
        self._console = console or Console()
        self._label = f"job {job_id[:8]}…" + ("  [bold red]SIMULATED[/]" if simulation else "")
        self._bar = _RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[step]}"),
            TextColumn("{task.fields[epsilon]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._awaited: dict[str, str] = {}
        self._task = self._bar.add_task(self._label, total=None, step="", epsilon="")

    def show(self, event: JobEvent) -> None:
        """Where the job is now."""
        step = f"step {event.step}/{event.steps}" if event.step is not None and event.steps is not None else ""
        epsilon = f"planned ε {event.epsilon:.3f}" if event.epsilon is not None else ""
        self._bar.update(
            self._task,
            description=f"{self._label}  {event.state}",
            total=event.steps,
            completed=event.step or 0,
            step=step,
            epsilon=epsilon,
        )

    def wait(self, awaited: dict[str, str]) -> None:
        """Which approvals key brokers wait for, each said once."""
        for name, words in awaited.items():
            if self._awaited.get(name) != words:
                self._console.print(f"{name}: {words}", markup=False)
        self._awaited = awaited

    def end(self, status: JobStatus, refusals: dict[str, str]) -> None:
        """How it ended, and why key brokers refused."""
        for name, words in refusals.items():
            self._console.print(f"{name} refused: {words}", markup=False)
        if status.reason is not None:
            self._console.print(f"job {status.job_id} {status.state}: {status.reason}", markup=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
