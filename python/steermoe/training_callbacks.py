"""What watches a training run: the progress bar, early stopping, a polite end on Ctrl-C, and the router's numbers for TensorBoard."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["EarlyStopping", "Interruption", "ProgressBar"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProgressBar(TrainerCallback):
    """Steps, loss and the latest score on the error stream: a bar on a terminal, a line per log elsewhere. The main process only."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console, transient=False)
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._shown["loss"] = f"loss {logs['loss']:.4f}"
        score = logs.get(f"eval_{self.metric}")
        if score is not None:
            self._shown["score"] = f"{self.metric} {score:.2%}"
        if self._progress is not None:
            self._progress.update(self._task, description=", ".join(self._shown.values()))
        elif "loss" in logs or score is not None:
            news = self._shown["loss"] if score is None else self._shown["score"]
            self.console.print(f"step {state.global_step}/{state.max_steps}: {news}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back. Also for a run that ends by an exception."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class EarlyStopping(TrainerCallback):
    """Ends the run after ``patience`` evaluations without a better score.

    It counts in the run's log, which a checkpoint holds, and keeps nothing itself: so a resumed run stops where an uninterrupted one does.
    """

    def __init__(self, metric: str, patience: int, greater_is_better: bool) -> None:
        self.metric, self.patience, self.sign = f"eval_{metric}", patience, 1 if greater_is_better else -1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_over(state):
            control.should_save = control.should_training_stop = True

    def is_over(self, state: TrainerState) -> bool:
        """Whether the log says that the run has waited long enough."""
        scores = [self.sign * entry[self.metric] for entry in state.log_history if self.metric in entry]
        return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= self.patience


class Interruption(TrainerCallback):
    """Ctrl-C or SIGTERM ends a run after the step at hand, with a checkpoint; a second one ends it at once, without.

    ``any_process`` says whether a flag is set in any process of a distributed run: they have to stop at the same step.
    """

    def __init__(self, any_process: Callable[[bool], bool]) -> None:
        self.any_process = any_process
        self.asked = False
        self.stopped = False
        # While the corpus is scored there is no step to wait for: the signal ends the scoring, and the run with it.
        self.may_raise = False
        # In memory that a DataLoader's workers share: whether the run goes on, and they with it.
        self.runs: Any = multiprocessing.RawValue("b", False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals inside the block. Only a program's main thread may: elsewhere they are left as they are."""
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS} if main else {}
        self.runs.value = True
        try:
            yield
        finally:
            self.runs.value = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or self.may_raise:
            raise KeyboardInterrupt

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.stopped and self.any_process(self.asked):
            self.stop(control)

    def stop(self, control: TrainerControl) -> None:
        """End the run here, saved."""
        self.stopped = True
        control.should_save = control.should_training_stop = True
        # It may take long, and Ctrl-C is not patient: a resumed run begins with it.
        control.should_evaluate = False


class DeafToSignals:
    """A DataLoader's ``worker_init_fn`` that leaves the signals which end a run to the main process, as long as it ``runs``.

    A scheduler may send them to all processes of a job: workers that died of them would take the step at hand, and the checkpoint, along.
    After the run they end a worker, as they must: a process that exits sends SIGTERM to its workers, and waits for them.
    """

    def __init__(self, runs: Any, inner: Callable[[int], None] | None) -> None:
        self.runs, self.inner = runs, inner

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if self.inner is not None:
            self.inner(worker)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.runs.value:
            # Not by an exception, which a collator could take for one of a row's.
            os._exit(0)
