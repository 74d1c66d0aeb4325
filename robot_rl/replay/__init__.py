"""Episodes on disk (zarr, crash-safe) and in RAM (windows, strata), and ways in and out for other formats."""

from robot_rl.replay.batches import ChunkBatch, WindowBatch
from robot_rl.replay.buffer import ReplayBuffer
from robot_rl.replay.errors import CorruptEpisodeError, HeldOutSeedError, SchemaError, StoreError, StoreFullError
from robot_rl.replay.sampling import STRATA, EmptyBufferError
from robot_rl.replay.store import EpisodeStore, StoreSummary, TailCursor, open_or_create
from robot_rl.replay.tailer import StoreTailer, Tailed
from robot_rl.replay.windows import WindowConfig
from robot_rl.replay.writer import EpisodeWriter

__all__ = [
    "STRATA",
    "ChunkBatch",
    "CorruptEpisodeError",
    "EmptyBufferError",
    "EpisodeStore",
    "EpisodeWriter",
    "HeldOutSeedError",
    "ReplayBuffer",
    "SchemaError",
    "StoreError",
    "StoreFullError",
    "StoreSummary",
    "StoreTailer",
    "TailCursor",
    "Tailed",
    "WindowBatch",
    "WindowConfig",
    "open_or_create",
]
