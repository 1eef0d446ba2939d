"""One training run: start or continue, train, evaluate, save, export.

The order inside the loop is fixed: evaluate, save, read the next batch, step, log. So a saved state of step n always
comes with the evaluation and the log lines up to n, and the position in the data is n x batch_size: continuing needs
nothing but the state.
"""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unimed_jax import config, config_rules, parallel
from unimed_jax.convert import native
from unimed_jax.data.pipeline import device_prefetch
from unimed_jax.errors import DataError, Preempted
from unimed_jax.train import (
    assemble,
    checkpoint,
    finish,
    hygiene,
    meter,
    plan,
    run_folder,
    saved_states,
    writers,
)

# Steps whose metrics may still be on the device. Reading them later keeps the device busy; waiting for them keeps
# the host from running ahead without bound.
LAG = 2


@dataclass(slots=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: "finished", "already finished" or "dry run".
        step: steps done.
        total_steps: steps of the whole run.
        metrics: the newest log line.
        model: the exported model folder.
        text: what to print.
    """

    status: str
    step: int
    total_steps: int
    metrics: dict[str, Any] = field(default_factory=dict)
    model: Path | None = None
    text: str = ""


def run(
    cfg: config.Train,
    workdir: str | Path,
    *,
    dry_run: bool = False,
    profile: tuple[int, int] | None = None,
    extend: bool = False,
) -> RunResult:
    """Trains to the end of `cfg.duration`, or continues a run that was stopped, at the exact sample.

    Args:
        cfg: the experiment; `data.root` must hold exported records.
        workdir: run folder: config.json, metrics.jsonl, checkpoints/, eval/, model/.
        dry_run: only say what would run.
        profile: trace the steps from <= step < to into workdir/profile.
        extend: permit another duration when continuing.

    Raises:
        UsageError: for impossible settings.
        DataError: for damaged data, other settings than those of the saved state, a second run in the same folder,
            a full disk, or a loss that is not finite (the state is saved under diverged/).
        Preempted: after SIGTERM or SIGINT, when the state is saved.
        Fault: when a data worker or a peer dies.
    """
    config_rules.validate(cfg)
    hygiene.allocator_environment()
    hygiene.open_file_limit()
    multi = bool(hygiene.initialize_distributed())
    hygiene.die_alone(multi)
    hygiene.compilation_cache()
    try:
        if dry_run:
            return RunResult(status="dry run", step=0, total_steps=0, text=plan.describe(cfg))
        workdir = Path(workdir).absolute()
        with run_folder.held(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
            return _Run(cfg, workdir, extend=extend, profile=profile, multi=multi).go()
    except BaseException as e:
        if multi:  # not through the interpreter's exit: it would wait for peers in a barrier
            hygiene.end(e)
        raise


class _Run:
    """The state of one process during a run."""

    def __init__(self, cfg: config.Train, workdir: Path, *, extend: bool, profile: Any, multi: bool):
        self.cfg, self.workdir, self.extend, self.profile = cfg, workdir, extend, profile
        self.multi = multi
        # On several (fake) CPU devices two programs in flight can take each other's threads and wait for ever.
        crowded = jax.default_backend() == "cpu" and jax.local_device_count() > 1
        self.lag = 0 if crowded else LAG
        self.chief = jax.process_index() == 0
        self.parts = assemble.assemble(cfg)
        finish.check_evaluation(cfg)
        self.total = self.parts.total_steps
        epoch = self.parts.data.epoch_examples
        self.every = {
            name: d.steps_for(batch_size=cfg.batch_size, epoch_examples=epoch)
            for name, d in (("save", cfg.checkpoint.every), ("eval", cfg.eval.every))
        }
        self.newest: dict[str, Any] = {}
        self.pending: collections.deque[tuple[int, Any]] = collections.deque()
        self.bad_steps: list[int] = []
        self.tracing = False
        self.sources = self.parts.data.mixture.names
        self.examples = np.zeros(len(self.sources), np.int64)  # read of each since the first step of the run
        self.outputs: list[writers.Writer] = []
        self.console: writers.Plain | writers.Bar | None = None

    # -- start --------------------------------------------------------------------------------------------------

    def go(self) -> RunResult:
        """The whole run."""
        with checkpoint.Checkpointer(self.workdir / "checkpoints", self.cfg.checkpoint.keep) as self.saved:
            if finish.is_exported(self.workdir, self.total) and self.saved.latest() == self.total:
                self._refuse_other_run(saved_states.read_meta(saved_states.find_step(self.workdir)))
                text = f"already finished: {self.total} steps, model in {self.workdir / 'model'}"
                return self._result("already finished", self.total, text)
            state, start = self._start()
            self.meter = meter.Meter(cfg=self.cfg)
            with self._open_outputs(start):
                if start < self.total:
                    state = self._train(state, start)
                return self._finish(state)

    def _start(self) -> tuple[dict[str, Any], int]:
        step = self.saved.latest()
        if step is None:
            self.saved.refuse_damaged_only()
            self._write_settings()
            return self._first_state()
        # The settings are compared before anything is restored: a difference must read as such, not as its effect.
        with contextlib.suppress(saved_states.Damaged):
            self._refuse_other_run(saved_states.read_meta(self.saved.folder / str(step)))
        state, meta = self.saved.restore(self.parts.state)
        changes = self._refuse_other_run(meta)
        if meta["step"] > self.total:
            raise DataError(
                f"the run in {self.workdir} has done {meta['step']} steps, the duration is {self.total}",
                "give a longer duration",
            )
        self._tell(
            f"continuing after step {meta['step']} of {self.total}" + "".join(f"; {c}" for c in changes)
        )
        self._write_settings()
        return state, meta["step"]

    def _first_state(self) -> tuple[dict[str, Any], int]:
        """The state before the first step, or after the last one of the run whose optimizer goes on."""
        lines: list[str] = []
        state = assemble.first_state(self.parts, lines.append)
        start = int(jax.device_get(state["step"]))
        if start >= self.total:
            raise DataError(
                f"{self.cfg.init.model} has done {start} steps, the duration is {self.total}",
                "give a longer duration",
            )
        for line in native.summary(lines):
            self._tell(line)
        if self.chief and lines:
            run_folder.write_json(self.workdir / "init.json", lines)
        return state, start

    def _refuse_other_run(self, meta: dict[str, Any]) -> list[str]:
        where = f"the saved state in {self.workdir}"
        changes = run_folder.refuse_drift(meta["config"], self.cfg, extend=self.extend, where=where)
        run_folder.refuse_other_data(meta, self.parts.digests, where)
        return changes

    def _write_settings(self) -> None:
        if self.chief:
            run_folder.write_json(self.workdir / "config.json", config.to_dict(self.cfg))
            facts = {
                "git": run_folder.git_revision(),
                "versions": checkpoint.versions(),
                **self.parts.digests,
            }
            run_folder.write_json(self.workdir / "environment.json", facts)

    @contextlib.contextmanager
    def _open_outputs(self, start: int) -> Iterator[None]:
        if self.chief:
            self.outputs = writers.open_writers(self.cfg.writers, self.workdir, start)
            self.console = writers.open_console(self.total, start)
        try:
            yield
        finally:
            for w in [*self.outputs, *([self.console] if self.console else [])]:
                w.close()

    # -- the loop -----------------------------------------------------------------------------------------------

    def _train(self, state: dict[str, Any], start: int) -> dict[str, Any]:
        put = lambda batch: parallel.put(batch, self.parts.mesh)
        with (
            hygiene.Watchdog(self.cfg.watchdog_s) as self.watchdog,
            hygiene.StopSignals(multi=self.multi) as stop,  # first: compiling may take minutes
            contextlib.closing(self.parts.data.batches(start)) as host_batches,
            contextlib.closing(device_prefetch(host_batches, put, self.cfg.data.prefetch)) as batches,
            contextlib.ExitStack() as at_end,
        ):
            at_end.callback(self._trace, None)
            with self.watchdog.paused():
                train_step = assemble.compiled_step(self.parts)
            self.meter.restart()
            self.examples = np.array(self.parts.data.mixture.counts(start * self.cfg.batch_size))
            for step in range(start, self.total):
                if step > start:
                    self._between(state, step)
                if stop.requested(step):
                    self._stop(state, step)
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                self._trace(step)
                state, metrics = train_step(state, batch)
                self.meter.step(waited)
                self._collect(state, step + 1, metrics)
                self._poll(state, step + 1)
                self.watchdog.beat()
            self._between(state, self.total)
        return state

    def _between(self, state: dict[str, Any], step: int) -> None:
        """After `step` steps: evaluate, then save."""
        last = step == self.total
        evaluate = bool(self.cfg.eval.tasks) and (last or self._due("eval", step))
        save = last or self._due("save", step)
        if not (evaluate or save):
            return
        with self.watchdog.paused():
            self._drain(state)
            if evaluate:
                self._record(step, finish.evaluate(self.parts, self._best(state), self.workdir, step))
            if save:
                self._save(state, step)
        self.meter.restart()

    def _due(self, what: str, step: int) -> bool:
        return bool(self.every[what]) and step % self.every[what] == 0

    def _stop(self, state: dict[str, Any], step: int) -> None:
        with self.watchdog.paused():
            self._drain(state)
            self._save(state, step)
            self.saved.wait()
        raise Preempted(
            f"stopped after step {step} of {self.total}; the state is saved", "run the same command again"
        )

    def _trace(self, step: int | None) -> None:
        """Before `step`: starts or ends the trace of `--profile`; None ends it, however the run came to its end.

        A run that continues within the window traces the part that is left.
        """
        first, last = self.profile or (0, 0)
        inside = step is not None and first <= step < last
        if inside and not self.tracing:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        elif self.tracing and not inside:
            self._drain_device()
            jax.profiler.stop_trace()
        self.tracing = inside

    def _drain_device(self) -> None:
        for _, metrics in self.pending:
            jax.block_until_ready(metrics)

    # -- saving -------------------------------------------------------------------------------------------------

    def _save(self, state: dict[str, Any], step: int) -> None:
        try:
            self.saved.save(step, state, self._meta())
        except DataError as e:
            self._save_again(state, step, e)

    def _save_again(self, state: dict[str, Any], step: int, failure: DataError) -> None:
        """One more try, since space may have been freed; waits for it."""
        if self.multi:  # the other processes do not know of the failure
            raise failure
        self._tell(f"{failure.cause}; trying once more")
        self.saved.save(step, state, self._meta())
        self.saved.wait()

    def _meta(self) -> dict[str, Any]:
        return {
            "config": config.to_dict(self.cfg),
            "git": run_folder.git_revision(),
            "total_steps": self.total,
            **self.parts.digests,
        }

    def _poll(self, state: dict[str, Any], step: int) -> None:
        """Notices a failed save now, not at the next one."""
        try:
            self.saved.poll()
        except DataError as e:
            with self.watchdog.paused():
                self._drain(state)
                self._save_again(state, step, e)

    # -- metrics ------------------------------------------------------------------------------------------------

    def _collect(self, state: dict[str, Any], step: int, metrics: Any) -> None:
        self.pending.append((step, metrics))
        while len(self.pending) > self.lag:
            self._read(state, *self.pending.popleft())

    def _drain(self, state: dict[str, Any]) -> None:
        while self.pending:
            self._read(state, *self.pending.popleft())

    def _read(self, state: dict[str, Any], step: int, metrics: Any) -> None:
        found = jax.device_get(metrics)
        self.examples = self.examples + found.pop("examples")
        values = {k: np.asarray(v).item() for k, v in found.items()}
        values |= {f"examples/{s}": int(n) for s, n in zip(self.sources, self.examples, strict=True)}
        bad = values.get("bad", 0) or not math.isfinite(values["loss"])
        self.bad_steps = [*self.bad_steps, step] if bad else []
        if bad:
            self._tell(f"step {step}: the loss or its gradient is not finite; the update was not applied")
        if bad or step % self.cfg.log_every == 0 or step == self.total:
            self._record(step, values | self.meter.read())
        elif self.console:
            self.console.advance(step)
        if len(self.bad_steps) >= self.cfg.max_bad_steps:
            self._diverged(state)

    def _record(self, step: int, values: dict[str, Any]) -> None:
        if not values:
            return
        self.newest = self.newest | values
        for w in [*self.outputs, *([self.console] if self.console else [])]:
            w.write(step, values)

    def _diverged(self, state: dict[str, Any]) -> None:
        """Saves the state and which records the bad steps read, for someone to look at, and stops."""
        steps, folder = self.bad_steps, self.workdir / "diverged"
        at = int(jax.device_get(state["step"]))
        with self.watchdog.paused(), checkpoint.Checkpointer(folder) as saved:
            saved.save(at, state, self._meta())
        if self.chief:
            run_folder.write_json(folder / "records.json", {str(s): self._records_of(s) for s in steps})
        raise DataError(
            f"the loss was not finite for {len(steps)} steps in a row ({steps[0]} to {steps[-1]}); the state and the "
            f"records read are in {folder}",
            "lower optim.lr or set optim.clip_norm, in a new --workdir",
        )

    def _records_of(self, step: int) -> list[dict[str, Any]]:
        mix, b = self.parts.data.mixture, self.cfg.batch_size
        draws = [mix.locate(i) for i in range((step - 1) * b, step * b)]
        return [
            {"source": mix.names[d.source], "record": int(d.record), "epoch": int(d.epoch)} for d in draws
        ]

    # -- end ----------------------------------------------------------------------------------------------------

    def _best(self, state: dict[str, Any]) -> Any:
        return state["ema"] if "ema" in state else state["params"]

    def _finish(self, state: dict[str, Any]) -> RunResult:
        self.saved.wait()
        model = finish.export(self.parts, self._best(state), self.workdir)
        finish.mark_exported(self.workdir, self.total)
        text = f"finished: {self.total} steps, {writers.describe(self.newest)}, model in {model}"
        return self._result("finished", self.total, text)

    def _result(self, status: str, step: int, text: str) -> RunResult:
        newest = self.newest or (writers.read_metrics(self.workdir / "metrics.jsonl") or [{}])[-1]
        model = self.workdir / "model"
        shown = text if self.chief else ""
        return RunResult(
            status=status, step=step, total_steps=self.total, metrics=newest, model=model, text=shown
        )

    def _tell(self, line: str) -> None:
        if self.chief:
            hygiene.say(line)
