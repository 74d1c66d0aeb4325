"""Versioned head weights on disk: published by one atomic rename, verified before use.

Layout of the folder (one directory a version, so that weights and manifest can only appear together)::

    weights/00000007/manifest.json
    weights/00000007/weights.safetensors

A publication is written under a temporary name, synced and renamed, so a process killed at any instruction leaves the old
versions and possibly a ``.tmp-*`` directory, which the next publication removes. Readers never lock and never see half a
version; they still verify every byte, because disks and copies fail too. Never pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
MAX_MANIFEST_BYTES = 1 << 20
_VERSION = re.compile(r"[0-9]{8,}")


DAMAGED_RETRY_S = (1.0, 30.0)


class VerificationError(RuntimeError):
    """Published weights that must not be used; the message names what is wrong."""


class DamagedError(VerificationError):
    """The bytes are not those that the manifest promises: cut, still being copied, or changed on the way."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and safetensors type (``F32``, ``BF16``, ``I64`` ...) of one tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """What is known about one published version.

    Attributes:
        version: from 1 on; 0 means the base policy and is never published. ``parent`` is the version it was trained from.
        sha256, size: of the safetensors file (bytes).
        config_hash, base_hash, stats_hash: of the configuration, the base policy and the normalisation it belongs to.
        metrics: finite numbers; a metric that was not finite is None.
        created_ns: wall clock of the publisher, for people only: order comes from ``version``.
    """

    version: int
    parent: int
    sha256: str
    size: int
    tensors: Mapping[str, TensorSpec]
    config_hash: str = ""
    base_hash: str = ""
    stats_hash: str = ""
    kind: str = "head"
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    created_ns: int = 0
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self) -> bytes:
        return (json.dumps(self.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> Manifest:
        """Raises VerificationError naming ``where`` and what is wrong."""
        try:
            raw = json.loads(data)
            if not isinstance(raw, dict):
                raise TypeError("it is not an object")
            if raw.get("schema") != SCHEMA:
                raise ValueError(f"schema {raw.get('schema')!r}, accepted is {SCHEMA}")
            tensors = {
                str(name): TensorSpec(tuple(int(n) for n in spec["shape"]), str(spec["dtype"]))
                for name, spec in raw.pop("tensors").items()
            }
            manifest = cls(tensors=tensors, **raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise VerificationError(f"{where}: manifest cannot be read: {error}") from error
        numbers_ok = all(isinstance(v, int) for v in (manifest.version, manifest.parent, manifest.size))
        if not numbers_ok or manifest.version < 1 or not re.fullmatch(r"[0-9a-f]{64}", str(manifest.sha256)):
            raise VerificationError(f"{where}: manifest holds an impossible version, parent, size or sha256")
        return manifest


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def serialize(tensors: Mapping[str, Tensor | np.ndarray]) -> bytes:
    """One safetensors blob of torch tensors and numpy arrays (any device, any layout).

    Raises:
        ValueError: no tensors, or a name that is not a non-empty string.
        TypeError: a value that is neither.
        VerificationError: a value that is not finite: such a head must never reach an actor.
    """
    if not tensors:
        raise ValueError("tensors is empty: accepted is at least one named tensor")
    import torch
    from safetensors.torch import save

    ready: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"tensor name {name!r}: accepted are non-empty strings")
        if isinstance(value, np.ndarray):
            tensor = torch.from_numpy(np.array(value, copy=True, order="C"))
        elif isinstance(value, torch.Tensor):
            tensor = value.detach().to("cpu", copy=True).contiguous()
        else:
            raise TypeError(f"tensor {name!r} is a {type(value).__name__}: accepted are torch tensors and numpy arrays")
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
            raise VerificationError(f"tensor {name!r} holds values that are not finite; it is not published")
        ready[name] = tensor
    return save(ready)


def read_header(blob: bytes, where: str) -> dict[str, TensorSpec]:
    """Names, shapes and types in a safetensors blob, without decoding the data. Raises VerificationError."""
    try:
        size = int.from_bytes(blob[:8], "little")
        if len(blob) < 8 or size > len(blob) - 8:
            raise ValueError(f"header of {size} bytes in a file of {len(blob)}")
        header = json.loads(blob[8 : 8 + size])
        header.pop("__metadata__", None)
        return {n: TensorSpec(tuple(int(x) for x in spec["shape"]), str(spec["dtype"])) for n, spec in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VerificationError(f"{where}: not a safetensors file: {error}") from error


def decode_verified(
    blob: bytes, manifest: Manifest, where: str, expected_shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Decode exactly the bytes that were checked against ``manifest``: size, sha256, names, shapes, types, finite values.

    Raises:
        VerificationError: naming the first thing that is wrong.
    """
    if len(blob) != manifest.size:
        raise DamagedError(f"{where}: {len(blob)} bytes, the manifest says {manifest.size} (truncated or still copying?)")
    digest = hashlib.sha256(blob).hexdigest()
    if digest != manifest.sha256:
        raise DamagedError(f"{where}: sha256 {digest[:12]}..., the manifest says {manifest.sha256[:12]}...")
    header = read_header(blob, where)
    if header != dict(manifest.tensors):
        odd = sorted(n for n in header.keys() | manifest.tensors.keys() if header.get(n) != manifest.tensors.get(n))
        raise VerificationError(f"{where}: tensors differ from the manifest: {odd[:5]}")
    if expected_shapes is not None:
        missing = sorted(expected_shapes.keys() - header.keys())
        unknown = sorted(header.keys() - expected_shapes.keys())
        if missing or unknown:
            raise VerificationError(f"{where}: tensors missing {missing[:5]}, not expected {unknown[:5]}")
        for name, shape in expected_shapes.items():
            if header[name].shape != tuple(shape):
                raise VerificationError(f"{where}: {name!r} has shape {header[name].shape}, expected {tuple(shape)}")
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(blob)
    except SafetensorError as error:
        raise VerificationError(f"{where}: not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
            raise VerificationError(f"{where}: {name!r} holds values that are not finite")
    return tensors


class WeightChannel:
    """A folder of published versions: one writer, any number of readers, in any number of processes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, version: int) -> Path:
        """The directory of one version, whether or not it exists."""
        if version < 1:
            raise ValueError(f"version={version}: accepted are integers >= 1 (0 is the base policy)")
        return self.folder / f"{version:08d}"

    def versions(self) -> list[int]:
        """Every published version, oldest first, without verifying their bytes."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if _VERSION.fullmatch(entry.name) and entry.is_dir())

    def latest(self) -> int | None:
        """The newest version with a readable manifest and weights of its size, or None.

        Newer ones that fail this cheap check are logged; :meth:`load` verifies everything else.
        """
        for version in reversed(self.versions()):
            try:
                manifest = self.manifest(version)
                size = (self.path(version) / WEIGHTS).stat().st_size
                if size == manifest.size:
                    return version
                reason = f"{size} bytes of weights, the manifest says {manifest.size}"
            except (VerificationError, OSError) as error:
                reason = str(error)
            logger.warning("weights version %d is passed over: %s", version, reason)
        return None

    def manifest(self, version: int) -> Manifest:
        """Raises VerificationError when it is missing, torn or belongs to another version."""
        where = f"weights version {version}"
        try:
            data = (self.path(version) / MANIFEST).read_bytes()
        except FileNotFoundError as error:
            raise VerificationError(f"{where}: no manifest; published are {self._told()}") from error
        manifest = Manifest.decode(data, where)
        if manifest.version != version:
            raise VerificationError(f"{where}: its manifest says version {manifest.version}")
        return manifest

    def load(self, version: int, expected_shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
        """The tensors of one version, on the CPU, after checking size, sha256, names, shapes, types and finite values.

        Args:
            expected_shapes: name to shape of every tensor the acting head has; anything missing, extra or different is refused.

        Raises:
            VerificationError: naming what is wrong; nothing was loaded.
        """
        manifest = self.manifest(version)
        where = f"weights version {version}"
        try:
            blob = (self.path(version) / WEIGHTS).read_bytes()
        except FileNotFoundError as error:
            raise DamagedError(f"{where}: {WEIGHTS} is missing") from error
        return decode_verified(blob, manifest, where, expected_shapes)

    def publish(
        self,
        tensors: Mapping[str, Tensor | np.ndarray],
        *,
        parent: int,
        config_hash: str = "",
        metrics: Mapping[str, float] | None = None,
        kind: str = "head",
        base_hash: str = "",
        stats_hash: str = "",
    ) -> Manifest:
        """Publish a new version, one above every version so far. It exists completely or not at all.

        Raises:
            ValueError: nothing to publish, or ``parent`` is negative.
            VerificationError: a tensor holds values that are not finite.
        """
        if parent < 0:
            raise ValueError(f"parent={parent}: accepted are integers >= 0 (0 is the base policy)")
        blob = serialize(tensors)
        clean: dict[str, float | None] = {}
        for name, value in (metrics or {}).items():
            clean[name] = float(value) if math.isfinite(float(value)) else None
        with self._writing():
            version = max(self.versions(), default=0) + 1
            manifest = Manifest(
                version=version,
                parent=int(parent),
                sha256=hashlib.sha256(blob).hexdigest(),
                size=len(blob),
                tensors=read_header(blob, "weights to publish"),
                config_hash=config_hash,
                base_hash=base_hash,
                stats_hash=stats_hash,
                kind=kind,
                metrics=clean,
                created_ns=time.time_ns(),
            )
            self._commit(manifest, lambda path: _write_synced(path, blob))
        return manifest

    def adopt(self, manifest: Manifest, weights: Path) -> None:
        """Take over a version that was fetched from elsewhere under its own number; ``weights`` is moved in.

        Raises:
            VerificationError: the file does not match, or the version exists here with other bytes.
        """
        where = f"weights version {manifest.version}"
        decode_verified(weights.read_bytes(), manifest, where)
        with self._writing():
            if self.path(manifest.version).exists():
                if self.manifest(manifest.version).sha256 != manifest.sha256:
                    raise VerificationError(f"{where}: exists here with other bytes; it is never overwritten")
                weights.unlink()
                return
            self._commit(manifest, lambda path: os.replace(weights, path))

    def prune(self, keep: int, protect: tuple[int, ...] = ()) -> list[int]:
        """Delete all but the newest ``keep`` versions and the protected ones (acting, on probation). Returns what went.

        Raises:
            ValueError: ``keep`` below 1: the newest version also remembers which number comes next.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: accepted are integers >= 1")
        with self._writing():
            gone = [v for v in self.versions()[:-keep] if v not in protect]
            for version in gone:
                self._remove(version)
        return gone

    def rewind(self, version: int) -> list[int]:
        """Delete every version after ``version``: a learner that resumes from an older checkpoint publishes them anew."""
        if version < 0:
            raise ValueError(f"version={version}: accepted are integers >= 0")
        with self._writing():
            gone = [v for v in self.versions() if v > version]
            for later in reversed(gone):  # newest first: killed half-way, what is left is still a history without holes
                self._remove(later)
        return gone

    # -- inside ----------------------------------------------------------------------------------------------------------

    def _told(self) -> str:
        found = self.versions()
        return "none" if not found else f"{found[0]}..{found[-1]}" if len(found) > 8 else str(found)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the writers' lock; whatever temporary directory exists now was left by a killed writer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for stale in self.folder.glob(".tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
            yield

    def _commit(self, manifest: Manifest, write_weights: Callable[[Path], object]) -> None:
        target = self.path(manifest.version)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.folder))
        os.chmod(temporary, 0o755)
        write_weights(temporary / WEIGHTS)
        _write_synced(temporary / MANIFEST, manifest.encode())
        _sync_directory(temporary)
        os.rename(temporary, target)
        _sync_directory(self.folder)

    def _remove(self, version: int) -> None:
        """Rename away first, so that a reader meets a whole version or none."""
        doomed = self.folder / f".tmp-removed-{version:08d}"
        os.rename(self.path(version), doomed)
        _sync_directory(self.folder)
        shutil.rmtree(doomed, ignore_errors=True)


class WeightSource(Protocol):
    """Where a subscriber looks: :class:`WeightChannel` itself or a remote mirror (``runtime/transfer.py``)."""

    def latest(self) -> int | None: ...

    def manifest(self, version: int) -> Manifest: ...

    def load(self, version: int, expected_shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]: ...


class WeightSubscriber:
    """The acting side: polls for versions and offers one only after everything about it was verified.

    Attributes:
        tensors: of the last accepted version, or None.
        accepted: its manifest, or None while the base acts.
        refused: how many publications were refused; ``last_error`` says why the last one was. A refused publication is not
            tried again unless its bytes change; where the bytes are not those of the manifest (cut, or wrong on the way) they are
            read again, first after a second, later less often.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        expected_shapes: Mapping[str, tuple[int, ...]] | None = None,
        base_hash: str = "",
        stats_hash: str = "",
        dry_forward: Callable[[dict[str, Tensor]], object] | None = None,
    ) -> None:
        """``dry_forward(tensors)`` runs the head once off-line; raising or returning False refuses the version."""
        self.source = source
        self.expected_shapes = expected_shapes
        self.base_hash, self.stats_hash = base_hash, stats_hash
        self.dry_forward = dry_forward
        self.tensors: dict[str, Tensor] | None = None
        self.accepted: Manifest | None = None
        self.refused = 0
        self.last_error = ""
        self._seen: tuple[int, str] | None = None
        self._again: tuple[float, float] | None = None  # when damaged bytes are looked at again, and the pause after that

    def poll(self, version: int | None = None) -> Manifest | None:
        """A newly verified version, or None when there is nothing new or it was refused; never raises for bad weights.

        Args:
            version: exactly this one (what the gate lets act) instead of the newest.
        """
        try:
            wanted = self.source.latest() if version is None else version
            if wanted is None:
                return None
            manifest = self.source.manifest(wanted)
        except (VerificationError, OSError) as error:
            self._refuse((version or -1, str(error)), error)
            return None
        identity = (manifest.version, manifest.sha256)
        if identity == self._seen and not (self._again and time.monotonic() >= self._again[0]):
            return None
        try:
            for name in ("base_hash", "stats_hash"):
                mine, theirs = getattr(self, name), getattr(manifest, name)
                if mine and theirs != mine:
                    raise VerificationError(f"weights version {wanted}: {name} {theirs!r}, the acting side has {mine!r}")
            tensors = self.source.load(wanted, self.expected_shapes)
            if self.dry_forward is not None:
                try:
                    passed = self.dry_forward(tensors)
                except OSError:  # the policy server that it asked is away, which says nothing about these weights
                    raise
                except Exception as error:
                    raise VerificationError(f"weights version {wanted}: dry forward raised {error!r}") from error
                if passed is False:
                    raise VerificationError(f"weights version {wanted}: dry forward refused it")
        except DamagedError as error:  # on the way, or still being copied: what was published may be whole
            pause = DAMAGED_RETRY_S[0] if identity != self._seen or self._again is None else self._again[1]
            self._refuse(identity, error)
            self._again = (time.monotonic() + pause, min(2.0 * pause, DAMAGED_RETRY_S[1]))
            return None
        except VerificationError as error:
            self._refuse(identity, error)
            return None
        except OSError as error:  # a link or disk that may recover: say so, and try again at the next poll
            self._refuse(None, error)
            return None
        self._seen, self.tensors, self.accepted, self.last_error, self._again = identity, tensors, manifest, "", None
        return manifest

    def _refuse(self, identity: tuple[int, str] | None, error: Exception) -> None:
        self.last_error = str(error)
        if identity is not None and identity == self._seen:
            return
        self._seen, self._again = identity, None
        self.refused += 1
        logger.warning("weights refused, the acting version stays: %s", error)
