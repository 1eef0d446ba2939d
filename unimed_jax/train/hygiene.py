"""How a training process starts, stops and dies: signals, watchdog, exit paths, caches, the multi-host start.

Left alone, one host's exception freezes all others for minutes in the runtime's shutdown barrier, and a host stuck in
input freezes them for ever. Here every way out is short, says why on one line and has its own exit code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from unimed_jax.errors import Fault, Stalled, UnimedError, UsageError

# Seconds. Peers must show up within the first, prove that they live within the second, and agree to end in the third.
INIT_TIMEOUT, HEARTBEAT_TIMEOUT, SHUTDOWN_TIMEOUT = 120, 30, 15


def say(line: str) -> None:
    """One line on stderr, at once, even while the interpreter goes down."""
    text = f"unimed-jax: {line}\n"
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except RuntimeError:  # in a signal handler, and the signal came in the middle of another write to stderr
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
    except (OSError, ValueError):
        pass


def leave(code: int) -> NoReturn:
    """Ends this process now: no atexit handlers, no barrier with peers that will never come."""
    for stream in (sys.stdout, sys.stderr):
        # RuntimeError: in a signal handler, and the signal came in the middle of a write to this stream.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(code)


# -- the multi-host start ---------------------------------------------------------------------------------------


def cluster(env: Mapping[str, str] | None = None) -> str:
    """The name of the launcher that started several processes of us, or "" for a single process.

    Example:
        >>> cluster({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}), cluster({"SLURM_JOB_ID": "7"})
        ('slurm', '')
    """
    env = os.environ if env is None else env

    def number(name: str) -> int:
        value = env.get(name, "")
        return int(value) if value.isdigit() else 0

    if env.get("JAX_COORDINATOR_ADDRESS"):
        return "jax"
    if env.get("SLURM_JOB_ID") and number("SLURM_STEP_NUM_TASKS") > 1:
        return "slurm"
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "openmpi"
    if len([h for h in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]) > 1:
        return "tpu"
    return ""


def initialize_distributed(env: Mapping[str, str] | None = None) -> str:
    """Joins the other processes when a launcher started several; returns its name ("" = single process).

    With JAX_COORDINATOR_ADDRESS, also JAX_NUM_PROCESSES and JAX_PROCESS_ID are read; the other launchers are
    recognised by JAX itself.

    Raises:
        UsageError: for a JAX_NUM_PROCESSES, JAX_PROCESS_ID or UNIMED_JAX_INIT_TIMEOUT that is no whole number.
        Fault: when peers do not show up within `INIT_TIMEOUT` seconds.
    """
    env = os.environ if env is None else env
    name = cluster(env)
    if not name:
        return ""
    import jax

    settings: dict[str, Any] = {}
    if name == "jax":
        settings["coordinator_address"] = env["JAX_COORDINATOR_ADDRESS"]
        for key, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
            if variable in env:
                settings[key] = _whole(env, variable)
    timeout = _whole({"UNIMED_JAX_INIT_TIMEOUT": str(INIT_TIMEOUT), **env}, "UNIMED_JAX_INIT_TIMEOUT")
    me = (
        f"process {settings['process_id']} of {settings.get('num_processes', '?')}: "
        if "process_id" in settings
        else ""
    )
    missing = Fault(
        f"{me}the processes of this {name} job did not come together within {timeout:g} s",
        "check that every process started and can reach the coordinator's port",
    )
    # The runtime's own time-out ends in an abort with a C++ trace: this timer is a little earlier and says why.
    alarm = threading.Timer(timeout, end, (missing,))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=int(timeout) + 15,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
            **settings,
        )
    except (RuntimeError, ValueError) as e:
        raise Fault(f"{missing.cause}: {' '.join(str(e).split())[:300]}", missing.remedy) from e
    finally:
        alarm.cancel()
    return name


def _whole(env: Mapping[str, str], variable: str) -> int:
    if not env[variable].isdecimal():
        raise UsageError(f"{variable} is {env[variable]!r}", "a whole number from 0")
    return int(env[variable])


def end(error: BaseException) -> NoReturn:
    """Says why on one line and ends this process at once, with the exit code of the error."""
    if isinstance(error, UnimedError):
        say(error.line())
        leave(error.exit_code)
    if isinstance(error, SystemExit):
        leave(error.code if isinstance(error.code, int) else 1)
    sys.__excepthook__(type(error), error, error.__traceback__)
    say(f"{type(error).__name__} on process {_process_index()}: {' '.join(str(error).split())[:300]}")
    leave(Fault.exit_code)


def die_alone(multi: bool) -> None:
    """In a multi-process run, makes any uncaught exception end this process at once instead of in a barrier."""
    if multi:
        sys.excepthook = lambda kind, error, trace: end(error)
        threading.excepthook = lambda a: end(a.exc_value or a.exc_type())


def _process_index() -> int:
    import jax

    return jax.process_index()


# -- stopping on a signal ---------------------------------------------------------------------------------------


class StopSignals:
    """SIGTERM and SIGINT ask for a stop after the running step; a second one ends the process at once.

    In a multi-process run the request must reach every process at the same step, so it goes through JAX's preemption
    service, which listens for SIGTERM itself; only SIGINT is handled here and passed on as SIGTERM.

    Example:
        >>> with StopSignals() as stop:
        ...     stop.requested(step=3)
        False
    """

    def __init__(self, *, multi: bool = False):
        self.multi = multi
        self._seen = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self.multi else (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._seen:
            say(f"second signal ({name}): leaving without saving")
            leave(128 + number)
        self._seen = name
        say(f"{name}: finishing the step and saving; a second signal leaves at once")
        if self.multi:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop before `step`; all processes get the same answer."""
        if self.multi:
            from jax.experimental import multihost_utils

            return bool(multihost_utils.reached_preemption_sync_point(step))
        return bool(self._seen)


# -- the watchdog -----------------------------------------------------------------------------------------------


class Watchdog:
    """A thread that ends the process with exit code 71 when no step came for `seconds`; 0 switches it off.

    The stacks of all threads go to stderr first, so that the cause can be read afterwards. Phases without steps
    (compiling, saving, evaluating) run inside `paused()`.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._last = time.monotonic()
        self._paused = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def beat(self) -> None:
        """A step is done."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No steps are expected inside."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.beat()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if not self._paused and time.monotonic() - self._last > self.seconds:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                stalled = Stalled(
                    f"no step for {self.seconds:.0f} s (watchdog_s)",
                    "the stacks above show where each thread waits",
                )
                say(stalled.line())
                leave(stalled.exit_code)


# -- caches and the allocator -----------------------------------------------------------------------------------


def compilation_cache(env: Mapping[str, str] | None = None) -> Path | None:
    """Switches JAX's persistent compilation cache on, in a folder that only this user can enter; returns it.

    JAX_COMPILATION_CACHE_DIR chooses another folder, empty switches the cache off. A folder that belongs to someone
    else is not used: a cached program is code.
    """
    import jax

    env = os.environ if env is None else env
    chosen = env.get("JAX_COMPILATION_CACHE_DIR")
    if chosen == "":
        return None
    base = Path(env.get("UNIMED_JAX_CACHE") or Path.home() / ".cache" / "unimed_jax").expanduser()
    folder = Path(chosen) if chosen else base / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = folder.stat()
        if info.st_uid != os.getuid() or info.st_mode & 0o022:
            say(f"compilation cache {folder} can be written by others: not used")
            return None
    except OSError as e:
        say(f"no compilation cache in {folder}: {e.strerror}")
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


def allocator_environment() -> None:
    """Lets glibc keep big freed buffers in processes started from here: image batches would fault in anew each time."""
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 28))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 29))


def open_file_limit() -> None:
    """Lets this process and its readers open up to 16384 files, if they may: a mixture has thousands of shards."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16384 if hard == resource.RLIM_INFINITY else min(hard, 16384)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a system may keep a lower limit than it names
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def quiet_libraries() -> None:
    """Keeps the logs of libraries off the terminal: what matters of them is said in our own lines."""
    import logging

    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    for name in ("orbax", "jax", "tensorstore"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    hook = sys.unraisablehook

    def unraisable(args: Any) -> None:
        # After one write or read of a checkpoint failed, TensorStore's threads report the others to a loop that is
        # gone; the failure itself has its own line.
        if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
            hook(args)

    sys.unraisablehook = unraisable
