"""Two machines in one: network namespaces, a proxy that cuts and corrupts, a wall clock that jumps, a disk that fills up."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

CLONE_NEWNET = 0x40000000
ROBOT_IP, LEARNER_IP = "10.77.0.1", "10.77.0.2"


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


class NetworkPair:
    """A robot's and a learner's network namespace, joined by a veth pair. Raises OSError where this machine does not allow it."""

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self._holed = [False, False]
        try:
            for _ in range(2):
                self._holders.append(subprocess.Popen(["unshare", "-n", "sleep", "infinity"], stdin=subprocess.DEVNULL))
            time.sleep(0.3)
            robot, learner = (p.pid for p in self._holders)
            self.robot, self.learner = (["nsenter", f"--net=/proc/{p}/ns/net"] for p in (robot, learner))
            self._robot_ns = f"/proc/{robot}/ns/net"
            _run(*self.robot, "ip", "link", "add", "va", "type", "veth", "peer", "name", "vb", "netns", str(learner))
            for prefix, device, address in ((self.robot, "va", ROBOT_IP), (self.learner, "vb", LEARNER_IP)):
                _run(*prefix, "ip", "addr", "add", f"{address}/24", "dev", device)
                for name in ("lo", device):
                    _run(*prefix, "ip", "link", "set", name, "up")
                _run(*prefix, "ip", "route", "add", "224.0.0.0/4", "dev", device)
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise OSError(f"no network namespaces here: {getattr(error, 'stderr', '') or error}") from error

    def enter(self) -> None:
        """This thread, and those it starts from now on, live on the robot's side."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(self._robot_ns, os.O_RDONLY)
        try:
            if libc.setns(fd, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(fd)

    def cut(self, direction: str) -> None:
        """Drop everything ``out`` of the robot, ``in`` to it, or ``both``: what leaves a namespace falls into a black hole."""
        for i, (prefix, ways) in enumerate(((self.robot, ("out", "both")), (self.learner, ("in", "both")))):
            if (wanted := direction in ways) != self._holed[i]:
                _run(*prefix, "ip", "rule", "add" if wanted else "del", "pref", "1", "blackhole")
                self._holed[i] = wanted

    def heal(self) -> None:
        self.cut("none")

    def close(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()


class Proxy:
    """TCP from here to the learner's endpoint; ``mode`` says what becomes of the bodies that pass.

    ``pass``; ``cut``: the next ``times`` connections with a body end inside it; ``flip``: one byte of the next ``times`` answers
    with a binary body is wrong; ``dead``: connections are refused.
    """

    def __init__(self, host: str, port: int, rng: random.Random) -> None:
        self.target, self.rng = (host, port), rng
        self.mode, self.times, self.done = "pass", 0, 0
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=32)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._stop = False
        threading.Thread(target=self._serve, name="proxy", daemon=True).start()

    def set(self, mode: str, times: int = 0) -> None:
        with self._lock:
            self.mode, self.times, self.done = mode, times, 0

    def _serve(self) -> None:
        while not self._stop:
            try:
                here, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(here,), daemon=True).start()

    def _carry(self, here: socket.socket) -> None:
        with here:
            if self.mode == "dead":
                return
            try:
                there = socket.create_connection(self.target, timeout=10.0)
            except OSError:
                return
            with there:
                for s in (here, there):
                    s.settimeout(40.0)
                back = threading.Thread(target=self._pump, args=(there, here, True), daemon=True)
                back.start()
                self._pump(here, there, False)
                back.join(40.0)

    def _take(self, mode: str) -> bool:
        with self._lock:
            if self.mode != mode or self.done >= self.times:
                return False
            self.done += 1
            return True

    def _pump(self, source: socket.socket, sink: socket.socket, answer: bool) -> None:
        """One direction; looks for the body after the header and does to it what the mode says."""
        head, body, spoiled, limit = b"", False, False, -1
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                if not body:
                    head += data
                    end = head.find(b"\r\n\r\n")
                    if end < 0:
                        sink.sendall(data)
                        continue
                    body = True
                    inside = head[end + 4 :]
                    large = b"octet-stream" in head[:end] if answer else head.startswith(b"PATCH")
                    length = _length(head[:end])
                    if large and length > 1 and self._take("cut"):
                        limit = self.rng.randrange(1, length)
                    elif large and answer and self._take("flip"):
                        spoiled = True
                    sink.sendall(data[: len(data) - len(inside)])
                    data = inside
                if spoiled and data:
                    at = self.rng.randrange(len(data))
                    data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
                    spoiled = False
                if 0 <= limit <= passed + len(data):
                    sink.sendall(data[: limit - passed])
                    for s in (source, sink):
                        s.shutdown(socket.SHUT_RDWR)
                    return
                passed += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._stop = True
        self._socket.close()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


# ---- a wall clock that jumps

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
/* Wall time with an offset that another process sets; absolute deadlines on wall time are taken back to the kernel's. */
static volatile int64_t *offset_ns;
static int64_t zero;
static int (*real_clock)(clockid_t, struct timespec *);
static int (*real_day)(struct timeval *, void *);
static int (*real_wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static void begin(void) {
  if (offset_ns) return;
  real_clock = dlsym(RTLD_NEXT, "clock_gettime");
  real_day = dlsym(RTLD_NEXT, "gettimeofday");
  real_wait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (!real_wait) real_wait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  const char *path = getenv("ROBOT_RL_TEST_CLOCK");
  int fd = path ? open(path, O_RDONLY) : -1;
  void *map = fd >= 0 ? mmap(0, 8, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
  if (fd >= 0) close(fd);
  offset_ns = map == MAP_FAILED ? &zero : (int64_t *)map;
}
__attribute__((constructor)) static void init(void) { begin(); }
static void shift(struct timespec *t, int64_t by) {
  int64_t ns = (int64_t)t->tv_sec * 1000000000LL + t->tv_nsec + by;
  t->tv_sec = ns / 1000000000LL;
  t->tv_nsec = ns % 1000000000LL;
}
int clock_gettime(clockid_t id, struct timespec *t) {
  begin();
  int rc = real_clock(id, t);
  if (!rc && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) shift(t, *offset_ns);
  return rc;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
  begin();
  int rc = real_day(t, zone);
  if (!rc) {
    struct timespec s = {t->tv_sec, t->tv_usec * 1000};
    shift(&s, *offset_ns);
    t->tv_sec = s.tv_sec;
    t->tv_usec = s.tv_nsec / 1000;
  }
  return rc;
}
time_t time(time_t *out) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  if (out) *out = t.tv_sec;
  return t.tv_sec;
}
int pthread_cond_timedwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m, const struct timespec *restrict until) {
  begin();
  struct timespec t = *until;
  if (t.tv_sec > 1000000000) shift(&t, -*offset_ns); /* uptimes are smaller than that */
  return real_wait(c, m, &t);
}
"""


class WallClock:
    """Processes started with :attr:`env` read a wall clock that :meth:`jump` moves. Raises OSError without a C compiler."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise OSError("no C compiler: the wall clock of a process cannot be moved here")
        source, library, file = folder / "clock.c", folder / "clock.so", folder / "clock.offset"
        source.write_text(SHIM)
        _run(compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread")
        file.write_bytes(bytes(8))
        with open(file, "r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), 8)
        self.offset_ns = 0
        self.env = {"LD_PRELOAD": str(library), "ROBOT_RL_TEST_CLOCK": str(file)}

    def jump(self, seconds: float) -> None:
        self.offset_ns += round(seconds * 1e9)
        self._map[:8] = struct.pack("<q", self.offset_ns)


# ---- a disk that fills up


class SmallDisk:
    """A tmpfs of its own at ``folder``. Raises OSError where this process may not mount."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder, self._ballast = folder, folder / ".ballast"
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"no tmpfs can be mounted here: {done.stderr.strip()}")

    def fill(self) -> None:
        """Not a byte more fits."""
        with open(self._ballast, "wb") as file:
            block = bytes(1 << 20)
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(self.folder).free - (1 << 20), 1))
                file.seek(0, os.SEEK_END)
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        os.write(file.fileno(), block[:size])

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True)


def own_mounts() -> str:
    """Mounts of this process are seen by nobody else from now on; what stands against it, or an empty text."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000):  # CLONE_NEWNS
        return os.strerror(ctypes.get_errno())
    if libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None):  # MS_REC | MS_PRIVATE
        return os.strerror(ctypes.get_errno())
    return ""


def children(pid: int) -> list[int]:
    """Living direct children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def resident_mb(pid: int) -> float:
    with suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def send(pid: int, number: signal.Signals) -> int:
    """Signal a process; the wall clock (ns) right before."""
    now = time.time_ns()
    os.kill(pid, number)
    return now
