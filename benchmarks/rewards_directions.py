"""Why no progress source orders all G1 episodes: simple models that cannot take a film for its reverse, over every split.

    python benchmarks/rewards_directions.py --cache FOLDER [--families linear retrieval odd state whole]

Each family has many settings. For every one of the 28 splits the setting is chosen inside the six training episodes (leave one out,
mean value-order correlation); the two held-out episodes are then scored with it, forwards and reversed. Beside that: the setting that
would have been best in hindsight, which nobody may use, and how far apart the two are.

- ``linear``: a linear function of whitened components of one frame.
- ``retrieval``: the share of the way of the training frames that look alike.
- ``odd``: the integral of an odd function of the motion of picture components, which a reversed copy turns around by construction:
  velocity, change of speed, or both (hands slow down before they touch something, and not after).
- ``state``: the same of the right arm's and hand's joints.
- ``whole``: sees a film to its end, so it can only label recordings. The share of the way from the film's own first frames to its own
  last ones orders every film; which way it runs is one bit, learned from statistics that change their sign when a film is reversed:
  when the share rises, when pictures, arm and hand move. ``right`` of each setting counts that bit alone, of 56.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
from rewards_real_pictures import EPISODES, EVERY, Features, video

from robot_rl import paths
from robot_rl.rewards.goal import ends, start_goal_projection
from robot_rl.rewards.statistics import value_order_correlation

Subset = tuple[int, ...]
LAYERS, GRIDS, CELLS = (7, 10, 13), (1, 2, 4), 4
RIGHT = [*range(7, 14), *range(20, 26)]  # joints of the right arm and hand in observation.state
SPLITS = list(itertools.combinations(range(len(EPISODES)), 2))


def rest(held: Subset) -> Subset:
    return tuple(i for i in range(len(EPISODES)) if i not in held)


class Rows:
    """Rows of every episode, and what PCA of some episodes makes of all of them (through inner products: rows are few and long)."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self.films = rows
        x = np.concatenate(rows).astype(np.float64)
        self.products = x @ x.T
        self.starts = np.r_[0, np.cumsum([len(r) for r in rows])]
        self._whitened: dict[Subset, np.ndarray] = {}

    def of(self, episodes: Subset) -> np.ndarray:
        return np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in episodes])

    def times(self, episodes: Subset) -> np.ndarray:
        return np.concatenate([np.linspace(0, 1, self.starts[i + 1] - self.starts[i]) for i in episodes])

    def whitened(self, train: Subset, most: int = 32) -> np.ndarray:
        if train not in self._whitened:
            at = self.of(train)
            inner = self.products[np.ix_(at, at)]
            mean, overall = inner.mean(0), inner.mean()
            values, vectors = np.linalg.eigh(inner - mean[:, None] - mean[None] + overall)
            values, vectors = np.maximum(values[::-1][:most], 1e-9), vectors[:, ::-1][:, :most]
            towards = self.products[:, at]
            centred = towards - towards.mean(1, keepdims=True) - mean[None] + overall
            self._whitened[train] = centred @ vectors / values * np.sqrt(len(at) - 1)
        return self._whitened[train]

    def part(self, values: np.ndarray, episode: int) -> np.ndarray:
        return values[self.starts[episode] : self.starts[episode + 1]]


Scorer = Callable[[Subset, int], tuple[float, float]]
"""From training episodes and another one to its value-order correlation, forwards and reversed."""


def linear(rows: Rows, components: int) -> Scorer:
    def score(train: Subset, episode: int) -> tuple[float, float]:
        z, t = rows.whitened(train)[:, :components], rows.times(train)
        voc = value_order_correlation(rows.part(z @ (z[rows.of(train)].T @ (t - t.mean())), episode))
        return voc, -voc

    return score


def retrieval(rows: Rows, components: int, width: float) -> Scorer:
    def score(train: Subset, episode: int) -> tuple[float, float]:
        at = rows.of(train)
        if components:
            z = rows.whitened(train)[:, :components]
            square = (z**2).sum(1)
            apart = square[:, None] + square[at][None] - 2 * z @ z[at].T
        else:
            square = np.diag(rows.products)
            apart = square[:, None] + square[at][None] - 2 * rows.products[:, at]
        apart = np.maximum(apart, 0.0)
        near = -rows.part(apart, episode) / (2 * width**2 * np.median(apart))
        weight = np.exp(near - near.max(1, keepdims=True))
        voc = value_order_correlation(weight @ rows.times(train) / weight.sum(1))
        return voc, -voc

    return score


def motion(z: np.ndarray, k: int, kinds: str) -> np.ndarray:
    """(T - 2k, D) numbers of three frames k apart, each of which changes its sign when the film runs backwards."""
    newest, middle, oldest = z[2 * k :], z[k:-k], z[: -2 * k]
    mean, out = (newest + oldest) / 2, []
    if "v" in kinds:
        out.append((newest - oldest) / 2)
    if "s" in kinds:
        faster = ((newest - middle) ** 2).sum(1, keepdims=True) - ((middle - oldest) ** 2).sum(1, keepdims=True)
        out += [faster, faster * mean, faster * mean**2]
    return np.concatenate(out, 1)


def odd(whitened: Callable[[Subset], list[np.ndarray]], k: int, kinds: str, ridge: float) -> Scorer:
    fitted: dict[Subset, np.ndarray] = {}

    def score(train: Subset, episode: int) -> tuple[float, float]:
        z = whitened(train)
        if train not in fitted:
            x = [motion(z[i], k, kinds) for i in train]
            gram, wanted = sum(a.T @ a / len(a) for a in x), sum(a.mean(0) for a in x)
            fitted[train] = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), wanted)

        def voc(film: np.ndarray) -> float:
            return value_order_correlation(np.r_[np.zeros(2 * k), np.cumsum(motion(film, k, kinds) @ fitted[train])])

        return voc(z[episode]), voc(z[episode][::-1])

    return score


def own_share(film: np.ndarray) -> np.ndarray:
    """(T,) share of the way from a film's first tenth to its last."""
    n = ends(len(film), 0.1)
    return start_goal_projection(film, film[:n].mean(0), film[-n:].mean(0))


def centroid(film: np.ndarray, k: int) -> float:
    """When a film moves, from -1 (all of it in the first frame) to 1: mean time, weighted with the change over ``k`` frames."""
    moved = np.linalg.norm(film[k:] - film[:-k], axis=1)
    return float(moved @ np.linspace(-1, 1, len(moved)) / moved.sum())


def directions(statistics: np.ndarray, ridge: float) -> Callable[[Subset], np.ndarray]:
    """From training episodes to whether each film is thought to run forwards (1) or backwards (-1), of (episodes, D) signed numbers."""

    def learned(train: Subset) -> np.ndarray:
        z = statistics / np.sqrt((statistics[list(train)] ** 2).mean(0))
        x = z[list(train)]
        return np.sign(z @ np.linalg.solve(x.T @ x + ridge * x.shape[1] * np.eye(x.shape[1]), x.sum(0)))

    return learned


def whole(order: list[float], learned: Callable[[Subset], np.ndarray]) -> Scorer:
    """``order``: value-order correlation of every film's own share, its direction given."""

    def score(train: Subset, episode: int) -> tuple[float, float]:
        voc = order[episode] * float(learned(train)[episode])
        return voc, -voc

    return score


def judged(scorers: dict[Hashable, Scorer]) -> dict[str, Any]:
    """Every split with the setting that its six episodes chose, and the best in hindsight."""
    known: dict[tuple[Hashable, Subset, int], tuple[float, float]] = {}

    def score(name: Hashable, train: Subset, episode: int) -> tuple[float, float]:
        key = (name, train, episode)
        if key not in known:
            known[key] = scorers[name](train, episode)
        return known[key]

    def inside(name: Hashable, train: Subset) -> float:
        return float(np.mean([score(name, tuple(j for j in train if j != i), i)[0] for i in train]))

    rows, every = [], {name: [score(name, rest(h), e) for h in SPLITS for e in h] for name in scorers}
    for held in SPLITS:
        chosen = max(scorers, key=lambda name: inside(name, rest(held)))
        for e in held:
            forward, backward = score(chosen, rest(held), e)
            rows.append(
                {
                    "held_out": [EPISODES[i] for i in held],
                    "episode": EPISODES[e],
                    "setting": str(chosen),
                    "voc": forward,
                    "reversed": backward,
                }
            )
    best = max(scorers, key=lambda name: float(np.median([v for v, _ in every[name]])))
    by = {e: float(np.mean([r["voc"] for r in rows if r["episode"] == e])) for e in EPISODES}
    return {
        "settings": len(scorers),
        "voc": float(np.median([r["voc"] for r in rows])), "voc_reversed": float(np.median([r["reversed"] for r in rows])),
        "by_episode": by,
        "best_in_hindsight": {
            "setting": str(best), "voc": float(np.median([v for v, _ in every[best]])), "voc_reversed": float(np.median([r for _, r in every[best]])),
        },
        "splits": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for features")
    parser.add_argument("--families", nargs="+", default=["linear", "retrieval", "odd", "state", "whole"])
    arguments = parser.parse_args()
    data, cache = paths.recordings(), arguments.cache.expanduser()
    if not (data / "g1_bottle_lerobot_v21").is_dir():
        print(json.dumps({"recordings": "absent", "looked_in": str(data)}))
        return
    cache.mkdir(parents=True, exist_ok=True)
    out: dict[str, Any] = {}
    if {"linear", "retrieval", "odd", "whole"} & set(arguments.families):
        features = Features(data, cache)
        films = data / "g1_bottle_lerobot_v21" / "videos" / "chunk-000" / "observation.images.cam_high"
        pictures: dict[tuple[int, int], Rows] = {}
        for layer in LAYERS:
            cells = []
            for e in EPISODES:
                load = lambda e=e: video(films / f"episode_{e:06d}.mp4", EVERY)  # noqa: E731
                rows = features(f"g1_{e}", load, CELLS, size=224, fit="squash", layer=layer)
                cells.append(rows.reshape(len(rows), -1, CELLS, CELLS))
            for grid in GRIDS:
                part = CELLS // grid
                shaped = [c.reshape(len(c), c.shape[1], grid, part, grid, part).mean((3, 5)).reshape(len(c), -1) for c in cells]
                pictures[layer, grid] = Rows(shaped)
        if "linear" in arguments.families:
            out["linear"] = judged({(*p, d): linear(r, d) for p, r in pictures.items() for d in (1, 2, 3, 4, 6, 8, 16)})
        if "retrieval" in arguments.families:
            ways = itertools.product((0, 8, 32), (0.15, 0.3, 0.6))
            out["retrieval"] = judged({(*p, d, w): retrieval(r, d, w) for (d, w) in ways for p, r in pictures.items()})
        if "odd" in arguments.families:
            scorers: dict[Hashable, Scorer] = {}
            for p, r in pictures.items():

                def eight(train: Subset, r: Rows = r) -> list[np.ndarray]:
                    return [r.part(r.whitened(train)[:, :8], i) for i in range(len(EPISODES))]

                for k, kinds, ridge in itertools.product((1, 3), ("v", "s", "vs"), (0.1, 1.0)):
                    scorers[(*p, k, kinds, ridge)] = odd(eight, k, kinds, ridge)
            out["odd"] = judged(scorers)
    if {"state", "whole"} & set(arguments.families):
        import pyarrow.parquet as parquet

        tables = [
            parquet.read_table(data / "g1_bottle_lerobot_v21" / "data" / "chunk-000" / f"episode_{e:06d}.parquet")
            for e in EPISODES
        ]
        joints = [np.stack(t["observation.state"].to_numpy())[::EVERY, RIGHT].astype(np.float64) for t in tables]
    if "state" in arguments.families:

        def six(train: Subset) -> list[np.ndarray]:
            x = np.concatenate([joints[i] for i in train])
            _, size, directions = np.linalg.svd(x - x.mean(0), full_matrices=False)
            onto = directions[:6].T / size[:6] * np.sqrt(len(x) - 1)
            return [(j - x.mean(0)) @ onto for j in joints]

        ways_of = itertools.product((1, 3), ("v", "s", "vs"), (0.1, 1.0))
        out["state"] = judged({(k, kinds, ridge): odd(six, k, kinds, ridge) for k, kinds, ridge in ways_of})
    if "whole" in arguments.families:
        own = {p: [r.films[i].astype(np.float64) for i in range(len(EPISODES))] for p, r in pictures.items()}
        share = np.array([[own_share(f).mean() - 0.5 for f in films] for films in own.values()]).T
        change = np.array([[centroid(f, k) for f in films] for films in own.values() for k in (1, 3)]).T
        parts = (slice(0, 7), slice(7, 13), slice(0, 13))
        moving = np.array([[centroid(j[:, part], k) for j in joints] for part in parts for k in (1, 2, 6)]).T
        signs = {"share": share, "change": change, "joints": moving, "all": np.concatenate([share, change, moving], 1)}
        order = [value_order_correlation(own_share(f)) for f in own[LAYERS[-1], GRIDS[-1]]]
        bits = {(name, ridge): directions(s, ridge) for name, s in signs.items() for ridge in (0.1, 1.0, 10.0)}
        right = {str(name): int(sum(bit(rest(h))[e] > 0 for h in SPLITS for e in h)) for name, bit in bits.items()}
        ways_whole: dict[Hashable, Scorer] = {name: whole(order, bit) for name, bit in bits.items()}
        out["whole"] = judged(ways_whole) | {"order": dict(zip(EPISODES, order, strict=True)), "right": right}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
