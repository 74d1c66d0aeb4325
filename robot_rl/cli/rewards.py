"""``robot-rl reward <action>``: label, report, apply, train, record, calibrate-delay, fake-vlm."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from robot_rl.cli.data import _counter, _display
from robot_rl.cli.output import FAILED, OK, UsageError, emit
from robot_rl.cli.reward_people import add_people, calibrate_delay, episodes_of, record


def reward(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "robot-rl reward", description="Rewards for recorded episodes, and what they are worth.", allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    every = {
        "label": ("score the episodes of a store with a source; the events go beside the episodes", label),
        "report": ("measure a source on a store's episodes; exit code 1 when it should not be trained on", report),
        "apply": ("copy episodes with their composed rewards written down, for learning offline", apply),
        "train": ("train the model of a source from a store's episodes", train),
        "record": ("mark frames of success in recorded episodes on a page, until there are enough for a classifier", record),
        "calibrate-delay": ("how many steps late a person's feedback comes", calibrate_delay),
        "fake-vlm": ("a model server for tests, with every way of going wrong", fake_vlm),
    }
    added = {}
    for name, (text, _) in every.items():
        action = added[name] = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.add_argument("--json", action="store_true", help="JSON lines on standard output")
        if name != "fake-vlm":
            action.add_argument("store", help="folder of the episode store")
            action.add_argument("--episodes", default="", metavar="ID,ID", help="only these episodes")
    for name in ("label", "report"):
        added[name].add_argument(
            "--source", required=True, help="configs/rewards/<name>.yaml, a path to one, or an installed kind"
        )
    added["label"].add_argument("--again", action="store_true", help="also episodes that this very model has labelled already")
    added["label"].add_argument("--verdict", action="store_true", help="record its judgement as the episodes' success")
    added["report"].add_argument("--out", default="reward_reports", help="folder for <source>.json and <source>.html")
    added["report"].add_argument(
        "--no-controls", action="store_true", help="leave out reversed, shuffled and wrong-instruction copies"
    )
    added["apply"].add_argument(
        "--reward", required=True, metavar="FILE", help="YAML with the `reward:` block of a training configuration"
    )
    added["apply"].add_argument("--gamma", type=float, required=True, help="discount of the learner (potentials depend on it)")
    added["apply"].add_argument("--out", required=True, help="folder of the new store")
    added["train"].add_argument(
        "--kind",
        required=True,
        help="classifier, feedback, preference, process, progress, transport, video_likelihood, video_similarity",
    )
    added["train"].add_argument("--out", required=True, help="folder of the model")
    added["train"].add_argument("--cameras", required=True, metavar="NAME,NAME", help="image features to look at")
    added["train"].add_argument(
        "--encoder", default="{}", metavar="JSON", help='such as {"kind": "squeezenet", "weights": "..."}'
    )
    added["train"].add_argument(
        "--grid", type=int, default=2, help="cells a side that feature maps are averaged over (progress)"
    )
    added["train"].add_argument("--options", default="{}", metavar="JSON", help="settings of the model, by name")
    added["train"].add_argument(
        "--positive-frames", type=int, default=5, help="last frames of a success that count as success (classifier)"
    )
    added["train"].add_argument("--every", type=int, default=1, help="take every n-th frame (progress)")
    added["train"].add_argument("--steps", type=int, default=1500, help="gradient steps at most")
    added["train"].add_argument("--seconds", type=float, default=600.0, help="seconds at most")
    added["train"].add_argument(
        "--gripper", type=int, default=-1, help="index of the gripper's opening in observation.state (process)"
    )
    added["train"].add_argument("--position", default="", metavar="I,J,K", help="indices of the hand's place in it (process)")
    added["train"].add_argument(
        "--vlm", default="{}", metavar="JSON", help="server and budget, as `vlm:` of a source (preference)"
    )
    added["train"].add_argument("--pairs", type=int, default=200, help="pairs of frames to ask about (preference)")
    added["train"].add_argument(
        "--comparisons",
        default="",
        metavar="FILE",
        help="choices made on the operator's page, instead of a server (preference)",
    )
    added["train"].add_argument("--goal", default="", help="where episodes name no task (preference)")
    added["train"].add_argument("--seed", type=int, default=0)
    added["train"].add_argument(
        "--marks", default="", metavar="FILE", help="frames that `robot-rl reward record` marked (classifier)"
    )
    added["train"].add_argument(
        "--feedback", default="human", metavar="SOURCE", help="source through which a person spoke (feedback)"
    )
    added["train"].add_argument("--demonstrations", type=int, default=5, help="successes to imitate (transport)")
    add_people(added["record"], added["calibrate-delay"])
    fake = added["fake-vlm"]
    fake.add_argument("--host", default="127.0.0.1")
    fake.add_argument("--port", type=int, default=8000)
    fake.add_argument(
        "--judge", default="brightness", help="brightness, pixel_threshold, goal_distance:<picture>, scripted:<JSON file>"
    )
    fake.add_argument("--seed", type=int, default=0)
    fake.add_argument(
        "--knob", action="append", default=[], metavar="NAME=VALUE", help="such as p_500=0.1; POST /_knobs changes them later"
    )
    fake.add_argument("--anywhere", action="store_true", help="allow a host that is not loopback")
    arguments = parser.parse_args(list(argv))
    return every[arguments.action][1](arguments)


@contextlib.contextmanager
def _source(arguments: argparse.Namespace) -> Iterator[Any]:
    """The source that was named, closed at the end where it holds a connection."""
    from robot_rl.rewards import load_source

    source = load_source(arguments.source)
    try:
        yield source
    finally:
        getattr(source, "close", lambda: None)()


def label(arguments: argparse.Namespace) -> int:
    from robot_rl.replay import EpisodeStore
    from robot_rl.rewards.labelling import label_store

    opened = EpisodeStore.open(arguments.store, mode="a", recover=False)
    with opened as store, _source(arguments) as source, _display(arguments) as progress:
        summary = label_store(
            store, source, episodes=episodes_of(arguments), again=arguments.again, verdict=arguments.verdict,
            progress=_counter(progress, "label"),
        )  # fmt: skip
    emit(summary.to_json(), arguments.json)
    return OK


def apply(arguments: argparse.Namespace) -> int:
    import yaml

    from robot_rl.config import decode
    from robot_rl.replay import EpisodeStore
    from robot_rl.rewards.applying import apply_rewards
    from robot_rl.rewards.composition_config import CompositionConfig
    from robot_rl.rewards.gate import admit

    content = yaml.safe_load(Path(arguments.reward).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UsageError(f"--reward={arguments.reward!r}: accepted is a mapping with `reward:` or `channels:`")
    config = decode(CompositionConfig, content.get("reward", content), where=arguments.reward)
    config = admit(config)  # refused before anything is made
    if Path(arguments.out).exists():
        raise UsageError(f"--out={arguments.out!r}: accepted is a folder that does not exist yet")
    with EpisodeStore.open(arguments.store) as store:
        spec = store.spec
        made = EpisodeStore.create(
            arguments.out, observation_features=spec.observation_features, action=spec.action, noise_shape=spec.noise_shape,
            chunk_horizon=spec.chunk_horizon, stats_hash=spec.stats_hash, image_codec=spec.image_codec, jpeg_quality=spec.jpeg_quality,
        )  # fmt: skip
        with made, _display(arguments) as progress:
            summary = apply_rewards(
                store, made, config, arguments.gamma, episodes=episodes_of(arguments), progress=_counter(progress, "apply")
            )
    emit({"store": arguments.out, **summary.to_json()}, arguments.json)
    return OK


def report(arguments: argparse.Namespace) -> int:
    from robot_rl.replay import EpisodeStore
    from robot_rl.rewards.labelling import read_episodes
    from robot_rl.rewards.report import judge_source, write_report

    with EpisodeStore.open(arguments.store) as store, _source(arguments) as source:
        found = judge_source(source, read_episodes(store, source, episodes_of(arguments)), controls=not arguments.no_controls)
    path = write_report(found, arguments.out)
    data = found.to_json()
    shown = {
        k: v for k, v in data.items() if k not in ("per_episode", "false_positive_frames", "calibration", "invalid", "cost")
    }
    emit({**shown, "report": str(path), "page": str(path.with_suffix(".html"))}, arguments.json)
    return FAILED if found.findings() else OK


def _mapping(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{flag}={text!r}: accepted is a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{flag}={text!r}: accepted is a JSON object")
    return value


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(i) for i in text.split(",") if i)
    except ValueError as error:
        raise UsageError(f"--position={text!r}: accepted are whole numbers, such as 0,1,2") from error


def train(arguments: argparse.Namespace) -> int:
    from robot_rl.replay import EpisodeStore
    from robot_rl.rewards.learned import FitBudget
    from robot_rl.rewards.training import KINDS, TrainOptions, train_model

    if arguments.kind not in KINDS:
        raise UsageError(f"--kind={arguments.kind!r}: accepted are {', '.join(KINDS)}")

    options = TrainOptions(
        kind=arguments.kind, cameras=tuple(c for c in arguments.cameras.split(",") if c), encoder=_mapping(arguments.encoder, "--encoder"),
        grid=arguments.grid, model=_mapping(arguments.options, "--options"), positive_frames=arguments.positive_frames,
        every=arguments.every, seed=arguments.seed, vlm=_mapping(arguments.vlm, "--vlm"), pairs=arguments.pairs, goal=arguments.goal, comparisons=arguments.comparisons,
        gripper=arguments.gripper, position=_indices(arguments.position), marks=arguments.marks, feedback=arguments.feedback, demonstrations=arguments.demonstrations,
    )  # fmt: skip
    with EpisodeStore.open(arguments.store) as store:
        model_id, fitted = train_model(
            store, options, FitBudget(arguments.steps, arguments.seconds), Path(arguments.out), episodes_of(arguments)
        )
    emit(
        {
            "model_id": model_id,
            "model": arguments.out,
            "steps": fitted.steps,
            "seconds": fitted.seconds,
            "stopped": fitted.stopped,
            **fitted.metrics,
        },
        arguments.json,
    )
    return OK


def fake_vlm(arguments: argparse.Namespace) -> int:
    import threading

    from robot_rl.rewards.goal import read_picture
    from robot_rl.rewards.vlm.fake_server import JUDGES, FakeVlmServer, Knobs, goal_distance, scripted

    name, _, given = arguments.judge.partition(":")
    if name in JUDGES and not given:
        judge = JUDGES[name]
    elif name == "goal_distance" and given:
        judge = goal_distance(read_picture(Path(given)))
    elif name == "scripted" and given:
        judge = scripted(json.loads(Path(given).read_text(encoding="utf-8")))
    else:
        raise UsageError(
            f"--judge={arguments.judge!r}: accepted are {', '.join(JUDGES)}, goal_distance:<picture>, scripted:<JSON file>"
        )
    knobs = Knobs()
    knobs.set({k: float(v) for k, _, v in (item.partition("=") for item in arguments.knob)})
    with FakeVlmServer(
        judge, knobs=knobs, host=arguments.host, port=arguments.port, seed=arguments.seed, anywhere=arguments.anywhere
    ) as server:
        emit({"url": server.url, "stats": f"{server.url}/_stats"}, arguments.json)
        threading.Event().wait()
    return OK
