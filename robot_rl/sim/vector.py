"""Many environments behind one step call: in turns, in threads, or in processes.

All three give the same numbers, bit for bit; they differ in speed only. Nothing resets by itself: a finished environment waits
for ``reset`` and is never stepped (asking for it is an error, raised before any environment has moved).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeAlias

import numpy as np

from robot_rl.sim.env import Environment, EnvSpec, make_env
from robot_rl.types import Observation

StepResult: TypeAlias = tuple[Observation, float, bool, bool, dict[str, Any]]
ResetResult: TypeAlias = tuple[Observation, dict[str, Any]]
Actions: TypeAlias = "Mapping[int, np.ndarray] | np.ndarray"

WORKERS = ("serial", "threads", "processes")


class _Vector:
    """Book-keeping that both kinds share: indices, and who may be stepped."""

    spec: EnvSpec

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.running = np.zeros(num_envs, bool)  # reset and not yet ended

    def __len__(self) -> int:
        return self.num_envs

    def reset(self, index: int, seed: int) -> ResetResult:
        """Reset one environment."""
        return self.reset_many({index: seed})[index]

    def reset_many(self, seeds: Mapping[int, int]) -> dict[int, ResetResult]:
        """Reset environments ``index -> seed``; returns ``index -> (observation, info)``."""
        for index in seeds:
            self._check_index(index)
        results = self._reset({int(i): int(s) for i, s in seeds.items()})
        self.running[list(seeds)] = True
        return results

    def step(self, actions: Actions, indices: Sequence[int] | None = None) -> list[StepResult]:
        """Step environments; results come in the order of ``indices``.

        Args:
            actions: ``index -> (A,)``, or (N, A) rows for ``indices``.
            indices: which environments; the keys of a mapping or all of them by default.

        Raises:
            ValueError: wrong index or number of actions.
            RuntimeError: one of them has ended and was not reset; none was stepped.
        """
        if isinstance(actions, Mapping):
            indices = list(actions) if indices is None else list(indices)
            missing = [i for i in indices if i not in actions]
            if missing:
                raise ValueError(f"step: no action for environment {missing[0]}; actions hold {sorted(actions)}")
            rows = [np.asarray(actions[i]) for i in indices]
        else:
            indices = list(range(self.num_envs)) if indices is None else list(indices)
            if len(actions) != len(indices):
                raise ValueError(f"step: {len(actions)} actions for {len(indices)} environments")
            rows = list(np.asarray(actions))
        if len(set(indices)) != len(indices):
            raise ValueError(f"step: an environment is listed twice in {list(indices)}")
        for index in indices:
            self._check_index(index)
            if not self.running[index]:
                raise RuntimeError(f"environment {index} has ended (or never began); reset it before stepping it")
        results = self._step([int(i) for i in indices], rows)
        for index, result in zip(indices, results, strict=True):
            self.running[index] = not (result[2] or result[3])
        return results

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.num_envs:
            raise ValueError(f"environment {index} does not exist; there are {self.num_envs}, from 0")

    def _reset(self, seeds: dict[int, int]) -> dict[int, ResetResult]:
        raise NotImplementedError

    def _step(self, indices: list[int], rows: list[np.ndarray]) -> list[StepResult]:
        raise NotImplementedError

    def look(self, wanted: Mapping[int, bool]) -> None:
        """Whether anybody will look at the pictures in the next observation of environment ``index``; all of them until told otherwise.

        Drawing is most of a step with cameras. A task that can leave it out then repeats the last pictures.
        """

    def render(self, index: int, camera: str = "", width: int = 320, height: int = 240) -> np.ndarray:
        """(height, width, 3) uint8 of one environment."""
        raise NotImplementedError

    def get_state(self, index: int) -> Any:
        raise NotImplementedError

    def set_state(self, index: int, state: Any, *, running: bool = True) -> None:
        """Put a saved state into one environment; ``running`` says whether its episode goes on."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VectorEnv(_Vector):
    """Environments in this process, stepped in turns or by a pool of threads.

    MuJoCo lets go of Python's lock inside ``mj_step``, so threads use several cores where physics is most of a step. Handing
    work over is not free: with one core, few environments, or very short steps, turns are faster. ``mujoco.rollout`` is not
    used: it stores the state of every physics sub-step, and took 408 us of processor time for a control step of
    PegInsertion where ``mj_step`` took 323.

    Args:
        envs: independent instances of one task.
        threads: 0 or 1 steps in turns; ``None`` takes one thread per core this process may use, at most one per environment.
    """

    def __init__(self, envs: Sequence[Environment], threads: int | None = None) -> None:
        if not envs:
            raise ValueError("VectorEnv needs at least one environment")
        super().__init__(len(envs))
        self.envs = list(envs)
        self.spec = envs[0].spec
        if threads is not None and threads < 0:
            raise ValueError(f"threads={threads}: accepted are None and integers >= 0")
        threads = min(_cores() if threads is None else threads, len(envs))
        self.threads = threads if threads > 1 else 1
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="vector-env") if self.threads > 1 else None

    def _map(self, call: Callable[[int], Any], count: int) -> list[Any]:
        """``[call(0), ..., call(count - 1)]``; each thread takes a fixed share, so that there is one hand-over per thread."""
        if self._pool is None or count < 2:
            return [call(k) for k in range(count)]
        shares = [range(t, count, self.threads) for t in range(min(self.threads, count))]
        futures = [self._pool.submit(lambda share: [call(k) for k in share], share) for share in shares[1:]]
        out: list[Any] = [None] * count
        failure: BaseException | None = None
        try:
            for k in shares[0]:
                out[k] = call(k)
        except Exception as error:
            failure = error
        for share, future in zip(shares[1:], futures, strict=True):  # always wait: nobody may still be stepping afterwards
            try:
                for k, value in zip(share, future.result(), strict=True):
                    out[k] = value
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return out

    def _reset(self, seeds: dict[int, int]) -> dict[int, ResetResult]:
        indices = list(seeds)
        results = self._map(lambda k: self.envs[indices[k]].reset(seed=seeds[indices[k]]), len(indices))
        return dict(zip(indices, results, strict=True))

    def _step(self, indices: list[int], rows: list[np.ndarray]) -> list[StepResult]:
        return self._map(lambda k: self.envs[indices[k]].step(rows[k]), len(indices))

    def look(self, wanted: Mapping[int, bool]) -> None:
        for index, looks in wanted.items():
            env: Any = self.envs[index]
            if hasattr(env, "looked_at"):
                env.looked_at = looks

    def render(self, index: int, camera: str = "", width: int = 320, height: int = 240) -> np.ndarray:
        self._check_index(index)
        return self.envs[index].render(camera, width, height)

    def get_state(self, index: int) -> Any:
        self._check_index(index)
        return self.envs[index].get_state()

    def set_state(self, index: int, state: Any, *, running: bool = True) -> None:
        self._check_index(index)
        self.envs[index].set_state(state)
        self.running[index] = running

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        for env in self.envs:
            env.close()


class ProcessVectorEnv(_Vector):
    """Environments in worker processes; for tasks whose steps are mostly Python.

    Environment ``i`` lives in worker ``i % workers``.

    Args:
        factory: builds one environment; must be picklable (a module's function or a ``functools.partial`` of one).
        num_envs: how many.
        processes: worker processes; one per core this process may use by default, at most one per environment.
        timeout: seconds to wait for a worker's answer before it is taken for hung (building an environment may take long).

    Raises:
        RuntimeError: from any call, when a worker has died or does not answer; the message names it, and the rest are stopped.
    """

    def __init__(
        self, factory: Callable[[], Environment], num_envs: int, processes: int | None = None, timeout: float = 300.0
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}: accepted are integers >= 1")
        if processes is not None and processes < 1:
            raise ValueError(f"processes={processes}: accepted are None and integers >= 1")
        super().__init__(num_envs)
        self.workers = min(_cores() if processes is None else processes, num_envs)
        self._timeout = timeout
        # Not fork: the parent may hold threads, GL contexts and CUDA, none of which survive it.
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for worker in range(self.workers):
            ours, theirs = context.Pipe()
            count = len(range(worker, num_envs, self.workers))
            process = context.Process(target=_serve, args=(theirs, factory, count), daemon=True, name=f"vector-env-{worker}")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            specs = [self._receive(w) for w in range(self.workers)]
        except _RemoteError as error:
            self._stop()
            raise error.as_local() from None
        self.spec = specs[0]

    def _place(self, index: int) -> tuple[int, int]:
        return index % self.workers, index // self.workers

    def _call(self, method: str, items: dict[int, Any]) -> dict[int, Any]:
        """Send ``index -> argument`` to the workers that hold them, one message each, and collect ``index -> result``."""
        batches: dict[int, list[tuple[int, Any]]] = {}
        for index, argument in items.items():
            worker, local = self._place(index)
            batches.setdefault(worker, []).append((local, argument))
        for worker, batch in batches.items():
            self._send(worker, (method, batch))
        out: dict[int, Any] = {}
        failure: Exception | None = None
        for worker in batches:  # every answer is taken before an error is raised, so that the pipes stay in step
            try:
                for local, result in self._receive(worker):
                    out[local * self.workers + worker] = result
            except _RemoteError as error:
                failure = failure or error.as_local()
        if failure is not None:
            raise failure
        return out

    def _send(self, worker: int, message: Any) -> None:
        if not self._pipes:
            raise RuntimeError("this ProcessVectorEnv is closed")
        try:
            self._pipes[worker].send(message)
        except OSError as error:
            raise self._lost(worker, "has died") from error

    def _receive(self, worker: int) -> Any:
        try:
            if not self._pipes[worker].poll(self._timeout):
                raise self._lost(worker, f"did not answer for {self._timeout:.0f} s")
            ok, payload = self._pipes[worker].recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._lost(worker, "has died") from error
        if not ok:
            raise _RemoteError(*payload)
        return payload

    def _lost(self, worker: int, what: str) -> RuntimeError:
        process = self._processes[worker]
        process.join(1.0)
        held = list(range(worker, self.num_envs, self.workers))
        code = "still running" if process.exitcode is None else f"exit code {process.exitcode}"
        self._stop()
        return RuntimeError(
            f"environment worker {worker} (pid {process.pid}, environments {held}) {what} ({code}); all were stopped"
        )

    def _reset(self, seeds: dict[int, int]) -> dict[int, ResetResult]:
        results = self._call("reset", seeds)
        return {i: results[i] for i in seeds}

    def _step(self, indices: list[int], rows: list[np.ndarray]) -> list[StepResult]:
        results = self._call("step", dict(zip(indices, rows, strict=True)))
        return [results[i] for i in indices]

    def render(self, index: int, camera: str = "", width: int = 320, height: int = 240) -> np.ndarray:
        self._check_index(index)
        return self._call("render", {index: (camera, width, height)})[index]

    def get_state(self, index: int) -> Any:
        self._check_index(index)
        return self._call("get_state", {index: None})[index]

    def set_state(self, index: int, state: Any, *, running: bool = True) -> None:
        self._check_index(index)
        self._call("set_state", {index: state})
        self.running[index] = running

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                try:
                    pipe.send(("close", []))
                except OSError:
                    continue
        for process in self._processes:
            process.join(5.0)
        self._stop()

    def _stop(self) -> None:
        self.running[:] = False
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes = [], []


class _RemoteError(Exception):
    """An exception of a worker: its type's name, message and traceback."""

    TYPES: ClassVar = {t.__name__: t for t in (ValueError, RuntimeError, TypeError, ImportError, FileNotFoundError)}

    def as_local(self) -> Exception:
        name, message, trace = self.args
        kind = self.TYPES.get(name)
        error = kind(message) if kind else RuntimeError(f"{name}: {message}")
        error.__cause__ = RuntimeError(f"in an environment worker:\n{trace}")
        return error


def _serve(pipe: Any, factory: Callable[[], Environment], count: int) -> None:
    """The worker's loop: builds its environments, then answers one message after the other until told to close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent, which closes us in order
    envs: list[Environment] = []
    calls: dict[str, Callable[[Environment, Any], Any]] = {
        "reset": lambda env, seed: env.reset(seed=seed),
        "step": lambda env, action: env.step(action),
        "render": lambda env, args: env.render(*args),
        "get_state": lambda env, _: env.get_state(),
        "set_state": lambda env, state: env.set_state(state),
    }
    try:
        envs += [factory() for _ in range(count)]
        pipe.send((True, envs[0].spec))
        while True:
            method, batch = pipe.recv()
            if method == "close":
                return
            answer: tuple[bool, Any]
            try:
                answer = (True, [(local, calls[method](envs[local], argument)) for local, argument in batch])
            except Exception as error:
                answer = (False, (type(error).__name__, str(error), traceback.format_exc()))
            pipe.send(answer)
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except Exception as error:
        pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    finally:
        for env in envs:
            env.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_vector(
    env_id: str, n: int, workers: str = "serial", *, num_workers: int | None = None, **options: Any
) -> VectorEnv | ProcessVectorEnv:
    """``n`` environments of one task.

    Args:
        env_id, options: as for :func:`robot_rl.sim.env.make_env`.
        workers: ``serial``, ``threads`` (physics-bound steps) or ``processes`` (Python-bound steps).
        num_workers: threads or processes; the cores of this process by default.
    """
    if workers not in WORKERS:
        raise ValueError(f"workers={workers!r}: accepted are {', '.join(WORKERS)}")
    if n < 1:
        raise ValueError(f"n={n}: accepted are integers >= 1")
    if workers == "processes":
        return ProcessVectorEnv(functools.partial(make_env, env_id, **options), n, num_workers)
    envs = [make_env(env_id, **options) for _ in range(n)]
    return VectorEnv(envs, threads=1 if workers == "serial" else num_workers)
