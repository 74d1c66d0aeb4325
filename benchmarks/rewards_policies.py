"""Does a policy that learns from a reward source get as far as one that learns from the true reward? One table, one row a source.

    python benchmarks/rewards_policies.py --runs runs/rewards --seeds 0 1 2 [--sources classifier,progress] [--slice 250]

The cheapest shipped task that shows it, with the same data for everybody: tabletop/Lift, 200 episodes that the quickstart's base
policy played (about two thirds of them fail), filmed. Sources learn from the first 60 of them, whose outcome is known; every source
labels all 200; ``robot-rl reward apply`` writes the composed reward down; and the same IQL, with the same number of updates, learns
from each copy. Its critic then chooses among sixteen chunks of the base: with no reward it chooses at random, and plays like the base
(row ``nothing``; a latent-noise head would not do here, since zero noise alone is a good policy of this base). A second control,
``step_cost``, is -1 a step whatever happens: what it reaches, a source of negative rewards may owe to episodes ending with success.
``share`` is the success of a source's policies over that of the policies that learnt from the true reward, over the same seeds and
the same 100 final starts.

Work that is done is only read; ``--slice`` stops cleanly after so many seconds, and the next call goes on. Sources that ask a VLM ask
the fault-injecting fake server, whose judge compares with a picture of a success: they show that the path works, not how good a VLM is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from recipes import CONFIGS, TASK_FILE, Bench, Entry, Settings, merged, nested, run_arguments

from robot_rl import seeding
from robot_rl.cli import main as verb
from robot_rl.config import load
from robot_rl.policies.loading import load_policy
from robot_rl.replay.store import EpisodeStore
from robot_rl.rewards.goal import read_picture
from robot_rl.rewards.vlm.fake_server import FakeVlmServer, goal_distance
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.sim.env import make_env
from robot_rl.sim.rollout import EpisodePlan, Rollout
from robot_rl.sim.vector import make_vector
from robot_rl.training.config import PostTrainConfig

EPISODES, JUDGED = 200, 60
CAMERA, SIZE = "observation.images.front", 64
BAR = 0.8
TRUTH = "truth"
RECIPE = CONFIGS / "recipes" / "best_of_n.yaml"
ENCODER = {"kind": "small_conv", "size": SIZE}
# Learning from what was recorded alone: the last round is one episode that the finished head plays, and nothing is learned from it.
OFFLINE: dict[str, Any] = {
    "device": "cpu",
    "demos": {"source": "store", "prefill": True},
    "env": {"num_envs": 16},
    # IQL asks for no action beside the recorded ones. Rewards of other sources have other scales than success: no bounds.
    "learner": {
        "n_critics": 2, "offline_critic": "iql", "critic_loss": "iql", "base_samples": 0, "value_min": None, "value_max": None,
    },
    "schedule": {
        "offline_updates": 1500, "warmup_steps": 0, "warmup_acting": "head", "return_updates": 0, "warmup_updates": 0,
        "env_steps": 1, "round_episodes": 1, "updates_per_step": 0.0, "demo_ratio": 1.0, "demo_ratio_end": 1.0, "candidate_every": 1,
        "evaluate_every": 1, "checkpoint_every_s": 30, "batch_size": 128,
    },
    "gate": {"n_min": 32, "n_max": 64},
    "stop": {"success": 1.0, "episodes": 1000},
    "evaluation": {"reference_episodes": 60, "curve_episodes": 20, "final_episodes": 100, "videos": 0},
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a source is made, and how what it says enters.

    Attributes:
        make: gives the source's settings from a laboratory; None: nobody is asked, the store knows.
        channel: of the composition, but for its report.
        more: further keys of the composition.
    """

    make: Callable[[Lab], dict[str, Any]] | None
    channel: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)


class Lab:
    """The episodes that everybody learns from, and what is made of them."""

    def __init__(self, shared: Path) -> None:
        self.base, self.path = shared / "clumsy" / "base", shared / "lab"
        self.episodes, self.models = self.path / "episodes", self.path / "models"
        self._server: FakeVlmServer | None = None

    def record(self) -> None:
        """Play the base, and film what it did by doing it again: the simulation is repeatable to the bit."""
        if (self.path / "complete").exists():
            return
        config, base = load(PostTrainConfig, TASK_FILE), load_policy(self.base, "cpu")
        spec = base.spec
        played = self.path / "played"
        if not (self.path / "played.complete").exists():
            _remove(played)
            store = EpisodeStore.create(
                played, observation_features=spec.observation_features, action=spec.action, noise_shape=spec.noise_shape,
                chunk_horizon=spec.horizon, stats_hash=spec.stats_hash, sync=False,
            )  # fmt: skip
            with store, make_vector(config.env.id, 16, "serial", **config.env.options) as vector:
                rollout = Rollout(vector, make_env(config.env.id).spec)
                acting = ActingPolicy(base, mode="base")
                plans = [EpisodePlan(seeding.TRAINING.first + i, ("rewards", i), acting, f"e{i:03d}") for i in range(EPISODES)]
                rollout.play(plans, store=store)
                store.flush()
            (self.path / "played.complete").touch()
        _remove(self.episodes)
        env = make_env(config.env.id, cameras=("front",), image_size=SIZE)
        filmed = EpisodeStore.create(
            self.episodes, observation_features=env.spec.observation_features, action=spec.action, noise_shape=spec.noise_shape,
            chunk_horizon=spec.horizon, stats_hash=spec.stats_hash, sync=False,
        )  # fmt: skip
        with EpisodeStore.open(played) as store, filmed:
            for name in store.episode_ids():
                episode = store.read(name)
                seen = [env.reset(seed=episode.meta.seed)[0]]
                seen += [env.step(action)[0] for action in episode.action]
                pictures = {n: np.stack([o[n] for o in seen]) for n in env.spec.observation_features}
                for feature, rows in episode.observations.items():
                    if not np.array_equal(rows, pictures[feature]):
                        raise RuntimeError(f"episode {name}: {feature} is another one when it is played again")
                episode.observations = pictures
                filmed.add(episode)
        (self.path / "complete").touch()

    def judged(self, success: bool | None = None) -> list[str]:
        """The episodes whose outcome the sources may know."""
        with EpisodeStore.open(self.episodes) as store:
            known = store.episode_ids()[:JUDGED]
            return [n for n in known if success is None or store.meta(n).success is success]

    def last_picture(self) -> Path:
        """The last frame of a success."""
        from PIL import Image

        path = self.models / "goal.png"
        if not path.exists():
            self.models.mkdir(parents=True, exist_ok=True)
            with EpisodeStore.open(self.episodes) as store:
                Image.fromarray(store.read(self.judged(True)[0], [CAMERA]).observations[CAMERA][-1]).save(path)
        return path

    def vlm(self) -> dict[str, Any]:
        """A server that answers like a VLM whose judge compares pictures with the end of a success; it lives as long as this process."""
        if self._server is None:
            self._server = FakeVlmServer(goal_distance(read_picture(self.last_picture()))).__enter__()
        budget = {"requests_per_day": 10**6, "tokens_per_day": 10**10, "money_per_day": 0.0}
        return {
            "base_url": self._server.url,
            "model": "goal-distance",
            "image_format": "png",
            "rate_per_s": 0,
            "in_flight": 8,
            **budget,
        }

    def trained(self, kind: str, *more: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """A model of ``robot-rl reward train``."""
        out = self.models / kind
        if not out.exists():
            words = [
                "reward",
                "train",
                str(self.episodes),
                "--episodes",
                ",".join(self.judged()),
                "--kind",
                kind,
                "--cameras",
                CAMERA,
            ]
            words += [
                "--encoder",
                json.dumps(ENCODER),
                "--options",
                json.dumps(options or {}),
                "--out",
                str(out),
                "--json",
                *more,
            ]
            if verb(words):
                raise RuntimeError(f"reward train --kind {kind} failed")
        return {"kind": kind, "model": str(out)}


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _rule(lab: Lab) -> dict[str, Any]:
    return {"kind": "rule", "rules": [{"field": "observation.state[17]", "op": ">", "value": 0.118}], "frames": 4}


def _video_similarity(lab: Lab) -> dict[str, Any]:
    model = Path(lab.trained("video_similarity")["model"])
    return {
        "kind": "video_similarity",
        "reference": str(model / "reference.npz"),
        "cameras": [CAMERA],
        "encoder": ENCODER,
        "grid": 2,
    }


def _transport(lab: Lab) -> dict[str, Any]:
    files = sorted(Path(lab.trained("transport", "--demonstrations", "3")["model"]).glob("demonstration*.npz"))
    return {"kind": "transport", "demonstrations": [str(f) for f in files], "cameras": [CAMERA], "encoder": ENCODER, "grid": 2}


CLASSIFIER = {"width": 64, "crops": 2, "pad": 2, "learning_rate": 1e-3}
PROGRESS = {"width": 32, "layers": 1, "components": 16, "batch": 16, "noise": 0.1}
TASK_ITSELF = {"terminal_phi": "keep"}  # a potential that is all there is: its sum must not depend on where the episode ends
WAYS: dict[str, Way] = {
    TRUTH: Way(None, {"source": "recorded", "kind": "dense"}),
    # Controls. A success ends an episode, and that alone teaches where every step costs something: dense rewards below 0 have a part of that.
    "nothing": Way(None, {"source": "recorded", "kind": "dense", "scale": 0.0}),
    "step_cost": Way(None, {"source": "recorded", "kind": "dense", "scale": 0.0, "shift": -1.0}),
    "human": Way(None, {"source": "label", "kind": "success"}),
    "rule": Way(_rule, {"kind": "success"}),
    "classifier": Way(lambda lab: lab.trained("classifier", "--positive-frames", "3", "--steps", "400", options=CLASSIFIER), {"kind": "success"}),
    "progress": Way(lambda lab: lab.trained("progress", "--steps", "600", options=PROGRESS), {"kind": "potential"}, TASK_ITSELF),
    "process": Way(
        lambda lab: lab.trained("process", "--gripper", "8", "--position", "0,1,2", "--steps", "400", options=CLASSIFIER),
        {"kind": "dense", "missing": "zero"},
    ),
    "goal_image": Way(
        lambda lab: {"kind": "goal_image", "cameras": [CAMERA], "goals": {CAMERA: str(lab.last_picture())}, "encoder": ENCODER, "grid": 2},
        {"kind": "potential"}, TASK_ITSELF,
    ),
    "vlm": Way(
        lambda lab: {"kind": "vlm", "camera": CAMERA, "method": "shuffled", "frames": 8, "vlm": lab.vlm()},
        {"kind": "potential"}, TASK_ITSELF,
    ),
    "preference": Way(
        lambda lab: lab.trained("preference", "--pairs", "400", "--steps", "400", "--vlm", json.dumps(lab.vlm())),
        {"kind": "preference-model", "shift": -1.0},
    ),
    "video_similarity": Way(_video_similarity, {"kind": "dense", "missing": "zero"}),
    "video_likelihood": Way(
        lambda lab: lab.trained("video_likelihood", "--steps", "400") | {"camera": CAMERA},
        # A density of continuous codes may be above 1: with a logarithm above 0 every step would pay, and ending the episode would cost.
        {"kind": "dense", "scale": 0.5, "shift": -0.5},
    ),
    "transport": Way(_transport, {"kind": "dense", "scale": 25.0}),  # an episode costs about 10, as in ROT (arXiv 2206.15469)
}  # fmt: skip


class RewardBench(Bench):
    """The runs of one folder: a source in place of a recipe."""

    def __init__(self, runs: Path, deadline: float) -> None:
        super().__init__(runs, Settings({}, {}, {}, {"clumsy": {}}, {name: Entry() for name in WAYS}), deadline)
        self.lab = Lab(self.shared)

    def config(self, recipe: str, seed: int) -> Path:
        path = self.runs / "configs" / f"{recipe}_seed{seed}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        change = nested({"demos.path": str(self.rewarded(recipe)), "base.path": str(self.shared / "clumsy" / "base")})
        path.write_text(yaml.safe_dump({"extends": [str(TASK_FILE), str(RECIPE)]} | merged(OFFLINE, change), sort_keys=False))
        return path

    def rewarded(self, name: str) -> Path:
        """The episodes with this source's reward; labelled, reported on and composed where that was not done."""
        out, way = self.lab.path / "rewarded" / name, WAYS[name]
        if (out / "complete").exists():
            return out
        _remove(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        channel = dict(way.channel)
        if way.make is not None:
            source = self.lab.models / f"{name}.yaml"
            settings = way.make(self.lab)
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(yaml.safe_dump({"name": name, **settings}))
            reports = self.lab.path / "reports"
            if verb(["reward", "label", str(self.lab.episodes), "--source", str(source), "--json"]):
                raise RuntimeError(f"reward label --source {source} failed")
            if not (reports / f"{name}.json").exists():  # its verdict is part of the row, and no reason to leave the source out
                verb(["reward", "report", str(self.lab.episodes), "--source", str(source), "--out", str(reports), "--json"])
            channel |= {"source": name, "report": str(reports / f"{name}.json")}
        block = self.lab.models / f"{name}.reward.yaml"
        block.parent.mkdir(parents=True, exist_ok=True)
        block.write_text(yaml.safe_dump({"reward": {"channels": [channel], "accept_uncalibrated": True, **way.more}}))
        gamma = load(PostTrainConfig, TASK_FILE).learner.gamma
        words = [
            "reward",
            "apply",
            str(self.lab.episodes),
            "--reward",
            str(block),
            "--gamma",
            str(gamma),
            "--out",
            str(out),
            "--json",
        ]
        if verb(words):
            raise RuntimeError(f"{' '.join(words)} failed")
        (out / "complete").touch()
        return out

    def findings(self, name: str) -> list[str] | None:
        path = self.lab.path / "reports" / f"{name}.json"
        return json.loads(path.read_text())["findings"] if path.exists() else None

    def rows(self, names: list[str], seeds: list[int]) -> list[dict[str, Any]]:
        """One row a source; ``holds`` needs all seeds of it and of the truth."""
        truth = self.row(TRUTH, seeds)
        out = []
        for name in names:
            row = self.row(name, seeds)
            row["source"] = row.pop("recipe")
            row["report"] = self.findings(name)
            both = sorted({*row["seeds"]} & {*truth["seeds"]})
            if both:
                best = [float(np.mean([r["best"][r["seeds"].index(s)] for s in both])) for r in (row, truth)]
                row["share"] = best[0] / best[1] if best[1] else None
                row["holds"] = len(both) == len(seeds) and best[1] > 0 and best[0] >= BAR * best[1]
            out.append(row)
        return out


def main() -> None:
    parser = run_arguments(__doc__, [0, 1, 2])
    parser.add_argument("--sources", default="", help="names, separated by commas; all by default")
    arguments = parser.parse_args()
    names = [n for n in arguments.sources.split(",") if n] or list(WAYS)
    unknown = [n for n in names if n not in WAYS]
    if unknown:
        parser.error(f"--sources={','.join(unknown)}: accepted are {', '.join(WAYS)}")
    names = [TRUTH, *(n for n in names if n != TRUTH)]
    bench = RewardBench(arguments.runs, time.monotonic() + arguments.slice)
    complete = True
    if not arguments.read:
        if arguments.retry:
            bench.forget_failures(names, arguments.seeds)
        bench.prepare(set())
        bench.lab.record()
        complete = all(bench.play(name, seed) for seed in arguments.seeds for name in names)
    rows = bench.rows(names, arguments.seeds)
    complete = complete and all(len(row["seeds"]) + len(row.get("failed", {})) == len(arguments.seeds) for row in rows)
    table = {"benchmark": "rewards_policies", "bar": BAR, "complete": complete, "rows": rows}
    text = json.dumps(table, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
