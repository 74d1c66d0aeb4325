"""The learner of a run in a process of its own, and who watches over it.

``python -m robot_rl.training.learner_process <run folder>`` is the learner: a fresh interpreter that reads everything it needs
from the run folder. :class:`LearnerProcess` starts it, restarts it when it dies or hangs, and never waits for it.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import robot_rl
from robot_rl.progress import Progress, Silent
from robot_rl.runtime.priority import set_nice
from robot_rl.runtime.weights import WeightChannel
from robot_rl.training.config import LearnerProcessConfig, PostTrainConfig
from robot_rl.training.exclusive import exclusive
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.learner_status import LearnerStatus, read_status
from robot_rl.training.run_folder import RunFolder, base_source

LOG = "process.log"
LOOK_S = 0.5
MAX_BACKOFF_S = 60.0
LOCK_WAIT_S = 60.0


# ---- the watcher


class LearnerProcess:
    """Starts the learner of a run folder and keeps it alive. Call :meth:`look` often; it costs microseconds and never waits.

    Attributes:
        restarts: how often it was started again.
        dead_since: wall clock (seconds) of the death that nobody has recovered from yet, or None.
        given_up: the learner stays dead; acting goes on with what it has.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: LearnerProcessConfig,
        progress: Progress | None = None,
        stores: Sequence[Path] = (),
        nice: int = 0,
    ) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress or Silent()
        self.stores, self.nice = [Path(s) for s in stores], nice
        self.restarts = 0
        self.dead_since: float | None = None
        self.given_up = False
        self.last_error = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._failures = 0  # in a row, without a publication between them
        self._version = 0
        self._retry_at = 0.0
        self._looked = self._heard = -float("inf")
        self._heartbeat = 0
        self._status: LearnerStatus | None = None

    @property
    def status(self) -> LearnerStatus | None:
        """The last heartbeat of any learner of this folder."""
        return self._status

    @property
    def pid(self) -> int | None:
        """Of the living learner, or None."""
        return self._process.pid if self.alive and self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the learner; returns at once."""
        self._status = read_status(self.folder.learner)
        self._version = self._status.version if self._status else 0
        self._launch()

    def look(self) -> None:
        """Read the heartbeat; restart a learner that died, kill one that hangs."""
        now = time.monotonic()
        if now - self._looked < LOOK_S or self._process is None or self.given_up:
            return
        self._looked = now
        self._read(now)
        if self.alive:
            if now - self._heard > self.settings.stale_after_s:
                self.progress.log(f"learner: no heartbeat for {self.settings.stale_after_s:.0f} s; it is killed")
                self._process.kill()
        elif self.dead_since is None:
            self._died(now)
        elif now >= self._retry_at:
            self.restarts += 1
            self._launch()

    def describe(self) -> str:
        """For the progress line: ``version 12, 3,400 updates`` or ``dead since 14:03:22 (...)``."""
        if self.dead_since is not None:
            return f"dead since {datetime.fromtimestamp(self.dead_since):%H:%M:%S} ({self.last_error})"
        status = self._status
        if status is None or status.state == "starting":
            return "starting"
        if status.state in ("collecting", "warm-up"):
            return f"{status.state}, {status.env_steps:,} steps"
        return f"version {status.version}, {status.updates:,} updates, {status.updates_owed:,.0f} owed"

    def stop(self, patience_s: float = 30.0, *, kill: bool = True) -> None:
        """Ask the learner to save and end; kill it when it does not within ``patience_s``.

        Without ``kill`` it is left to finish its checkpoint on its own; whoever starts next waits for it.
        """
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                if not kill:
                    self.progress.log("learner: still saving; it ends on its own")
                    return
                self.progress.log(f"learner: did not stop within {patience_s:.0f} s; it is killed")
                process.kill()
                process.wait()
        self._status = read_status(self.folder.learner)

    def _command(self) -> list[str]:
        module = "robot_rl.training.learner_process"
        more = [f"--store={path}" for path in self.stores]
        return [sys.executable, "-m", module, str(self.folder.path), f"--parent={os.getpid()}", f"--nice={self.nice}", *more]

    def _launch(self) -> None:
        self.folder.learner.mkdir(parents=True, exist_ok=True)
        # The learner must find this very package, however the acting side found it.
        path = os.pathsep.join(
            [str(Path(robot_rl.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        environment = {**os.environ, "PYTHONPATH": path}
        with (self.folder.learner / LOG).open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is the acting side's to handle, which then stops the learner.
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.dead_since = None
        self._heard = time.monotonic()

    def _read(self, now: float) -> None:
        status = read_status(self.folder.learner)
        if status is None:
            return
        self._status = status
        if status.heartbeat_ns != self._heartbeat:
            self._heartbeat, self._heard = status.heartbeat_ns, now
        if status.version > self._version:
            self._version, self._failures = status.version, 0

    def _died(self, now: float) -> None:
        assert self._process is not None
        code = self._process.poll()
        self.dead_since = time.time()
        own = self._status if self._status is not None and self._status.pid == self._process.pid else None
        self.last_error = own.error if own is not None and own.error else f"exit status {code}"
        self._failures += 1
        if self._failures > self.settings.restarts:
            self.given_up = True
            self.progress.log(
                f"learner: died {self._failures} times in a row ({self.last_error}); it is not restarted, acting goes on "
                f"without improving. Its log: {self.folder.learner / LOG}"
            )
            return
        wait = min(self.settings.backoff_s * 2.0 ** (self._failures - 1), MAX_BACKOFF_S)
        self._retry_at = now + wait
        self.progress.log(f"learner: died ({self.last_error}); acting goes on, restart {self._failures} in {wait:.1f} s")


# ---- the learner


def learn(run_dir: Path, parent: int = 0, stores: Sequence[Path] = ()) -> None:
    """Learn for the run in ``run_dir`` until SIGTERM, or until the process ``parent`` (0: nobody) is gone.

    ``stores`` are followed beside the run's own.
    """
    from robot_rl.config import load

    folder = RunFolder(run_dir)
    config = load(PostTrainConfig, folder.config)
    # An orphan of a killed run is given time to notice and leave.
    refusal = f"{folder.learner}: another learner works on this run; end it, or use another run_dir"
    with InterruptFlag() as flag, exclusive(folder.learner / "lock", refusal, flag, LOCK_WAIT_S):

        def stop() -> bool:
            return flag() or (parent != 0 and os.getppid() != parent)

        status = LearnerStatus.begin()
        status.write(folder.learner)
        try:
            _work(config, folder, stop, stores)
        except BaseException as error:
            status = read_status(folder.learner) or status
            status.state, status.error = "failed", f"{type(error).__name__}: {error}"
            status.write(folder.learner)
            raise


def _work(config: PostTrainConfig, folder: RunFolder, stop: Callable[[], bool], stores: Sequence[Path]) -> None:
    from robot_rl.nn.compiled import set_threads
    from robot_rl.policies.loading import load_policy
    from robot_rl.training.build import pick_device
    from robot_rl.training.demonstrations import gathered
    from robot_rl.training.learner_core import LearnerCore
    from robot_rl.training.learner_loop import LearnerLoop, LoopCounters
    from robot_rl.training.scalars import ScalarLog

    if config.learner_process.threads:
        set_threads(config.learner_process.threads)
    device = pick_device(config.device)
    base = load_policy(base_source(folder.base, config.base), device)
    demos = gathered(config.demos, folder) if config.demos.prefill else []
    scalars = ScalarLog(folder, config, job="learner")
    try:
        core = LearnerCore(config, base, demos, LoopCounters(), folder, scalars, device)
        every = list(dict.fromkeys([folder.store.resolve(), *(s.resolve() for s in stores)])) if stores else [folder.store]
        loop = LearnerLoop(core, every, WeightChannel(folder.weights), folder.learner, config.learner_process, stop)
        if loop.resume():
            logging.info("resumed at %d updates, %d episodes", core.learner.updates, loop.counters.episodes)
        loop.run()
    finally:
        scalars.close()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="robot_rl.training.learner_process", description="The learner of a run folder.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--parent", type=int, default=0, help="end when this process is gone (0: never)")
    parser.add_argument("--store", type=Path, action="append", default=[], help="another episode store to learn from")
    parser.add_argument("--nice", type=int, default=0, help="nice level, at least that of whoever starts this")
    given = parser.parse_args(arguments)
    if given.nice:
        set_nice(max(given.nice, os.getpriority(os.PRIO_PROCESS, 0)))  # inherited; never above whoever started it
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    learn(given.run_dir, given.parent, given.store)


if __name__ == "__main__":
    main()
