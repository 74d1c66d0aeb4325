"""Train the model of a source from the episodes of a store (``robot-rl reward train``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from robot_rl.replay.store import EpisodeStore
from robot_rl.rewards.classifier import save_classifier
from robot_rl.rewards.classifier_model import ClassifierConfig, LabelledFrames, fit_classifier
from robot_rl.rewards.features import FeatureConfig, FrameFeatures
from robot_rl.rewards.learned import FitBudget, FitReport
from robot_rl.rewards.marks import marked_frames, read_looks
from robot_rl.rewards.progress import save_progress
from robot_rl.rewards.progress_model import Clip, ProgressConfig, fit_progress
from robot_rl.rewards.stages import keyframe_labels, keyframes
from robot_rl.rewards.text import build_text_encoder
from robot_rl.rewards.video_likelihood import VideoConfig, fit_video, save_video
from robot_rl.types import OBSERVATION_STATE, Episode, RewardKind
from robot_rl.vision.encoders import EncoderConfig

OTHER_TASKS = (
    "open the top drawer", "close the microwave door", "wipe the table with the sponge", "turn on the lamp", "fold the towel in half",
    "pour water into the bowl", "push the button on the wall", "stack the plates in the rack",
)  # fmt: skip
"""Instructions that stand for "some other task" where a store knows only one."""


Kind = Literal[
    "classifier", "feedback", "preference", "process", "progress", "transport", "video_likelihood", "video_similarity"
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class TrainOptions:
    """Attributes:
    model: settings of the model's own configuration class, by name.
    positive_frames: of a success, so many last observations count as success; every frame of a failure counts as none.
    every: every n-th frame of a demonstration is learned from.
    gripper, position: of ``process``: which numbers of ``observation.state`` are the gripper's opening and the hand's place.
    vlm, pairs, goal: of ``preference``: the model server that compares, how many pairs it is asked about, and the goal where
        episodes name no task.
    marks: of ``classifier``: file of frames that a person marked; then nothing is guessed from ``positive_frames``.
    feedback: of ``feedback``: source of the reward log through which a person spoke.
    demonstrations: of ``transport``: how many successes are imitated.
    comparisons: of ``preference``: file of choices that people made on the operator's page; then nobody else is asked.
    """

    kind: Kind
    cameras: tuple[str, ...]
    encoder: dict[str, Any] = field(default_factory=dict)
    grid: int = 2
    model: dict[str, Any] = field(default_factory=dict)
    positive_frames: int = 5
    every: int = 1
    seed: int = 0
    gripper: int = -1
    position: tuple[int, ...] = ()
    vlm: dict[str, Any] = field(default_factory=dict)
    pairs: int = 200
    goal: str = ""
    comparisons: str = ""
    marks: str = ""
    feedback: str = "human"
    demonstrations: int = 5


def train_model(
    store: EpisodeStore, options: TrainOptions, budget: FitBudget, out: Path, episodes: Sequence[str] | None = None
) -> tuple[str, FitReport]:
    """Read, fit, save; gives the model's identity and what the fit measured on held-out episodes.

    Raises:
        ValueError: the store lacks a camera, or has not the episodes this kind learns from.
    """
    features = FeatureConfig(options.cameras, EncoderConfig(**options.encoder), options.grid)
    absent = [c for c in features.cameras if c not in store.observation_features]
    if absent:
        raise ValueError(f"cameras={', '.join(absent)}: the store has {', '.join(sorted(store.observation_features))}")
    keys = list(features.cameras)
    if options.kind == "process" or (options.kind == "classifier" and int(options.model.get("state", 0))):
        keys.append(OBSERVATION_STATE)
    read = [store.read(e, keys) for e in (store.episode_ids() if episodes is None else episodes)]
    if options.kind == "classifier":
        return _classifier(read, features, options, budget, out)
    if options.kind == "preference":
        return _preference(read, features, options, budget, out)
    if options.kind == "feedback":
        return _feedback(store, read, features, options, budget, out)
    good = [e for e in read if e.meta.success]
    if not good:
        raise ValueError(f"none of {len(read)} episodes is recorded as a success: {options.kind} learns from successes")
    if options.kind == "process":
        return _process(good, features, options, budget, out)
    if options.kind == "progress":
        return _progress(good, features, options, budget, out)
    if options.kind in ("transport", "video_similarity"):
        return references(good, read, features, options, out)
    clips = [np.asarray(e.observations[features.cameras[0]])[:: options.every] for e in good]
    model, report = fit_video(clips, VideoConfig(**options.model), budget, seed=options.seed)
    return save_video(out, model), report


def labelled_frames(
    episodes: Sequence[Episode], cameras: Sequence[str], positive_frames: int, state: int = 0
) -> LabelledFrames:
    """Frames of judged episodes: the last ones of a success are positive, every one of a failure is negative.

    Frames of a success between its beginning and its last ones are negatives too, except the ``positive_frames`` before the
    positives: nobody said when exactly it was done.
    """
    images: dict[str, list[np.ndarray]] = {c: [] for c in cameras}
    positive, number, states = [], [], []
    for k, episode in enumerate(e for e in episodes if e.meta.success is not None):
        count = len(episode) + 1
        keep, yes = np.ones(count, bool), np.zeros(count, bool)
        if episode.meta.success:
            yes[-positive_frames:] = True
            keep[-2 * positive_frames : -positive_frames] = False
        for camera in cameras:
            images[camera].append(np.asarray(episode.observations[camera])[keep])
        if state:
            states.append(np.asarray(episode.observations[OBSERVATION_STATE])[keep, :state])
        positive.append(yes[keep])
        number.append(np.full(int(keep.sum()), k))
    if not positive:
        raise ValueError("no episode has a recorded success or failure: label them first")
    return LabelledFrames(
        {c: np.concatenate(v) for c, v in images.items()}, np.concatenate(positive), np.concatenate(number),
        np.concatenate(states) if states else None,
    )  # fmt: skip


def _classifier(
    episodes: list[Episode], features: FeatureConfig, options: TrainOptions, budget: FitBudget, out: Path
) -> tuple[str, FitReport]:
    config = ClassifierConfig(**options.model)
    if options.marks:
        frames = marked_frames(read_looks(options.marks), episodes, features.cameras, config.state)
    else:
        frames = labelled_frames(episodes, features.cameras, options.positive_frames, config.state)
    reader = FrameFeatures(features)
    model, report = fit_classifier(frames, reader.encoder, config, budget, seed=options.seed)
    report.metrics |= {"positive_frames": float(frames.positive.sum()), "negative_frames": float((~frames.positive).sum())}
    return save_classifier(out, model, reader, threshold=report.metrics["threshold"]), report


def _process(
    episodes: list[Episode], features: FeatureConfig, options: TrainOptions, budget: FitBudget, out: Path
) -> tuple[str, FitReport]:
    """Find where sub-tasks end in successes, and learn what the moments before look like."""
    size = episodes[0].observations[OBSERVATION_STATE].shape[1]
    if not 0 <= options.gripper < size or len(options.position) != 3 or not all(0 <= i < size for i in options.position):
        raise ValueError(
            f"gripper={options.gripper}, position={list(options.position)}: accepted are one and three indices into the {size} numbers "
            f"of {OBSERVATION_STATE}"
        )
    labels, counts = [], []
    for e in episodes:
        hz = e.meta.control_hz
        if hz <= 0:
            raise ValueError(f"episode {e.meta.episode_id} has control_hz={hz}: accepted are positive rates")
        state = np.asarray(e.observations[OBSERVATION_STATE], np.float64)
        found = keyframes(state[:, options.gripper], state[:, list(options.position)], hz)
        labels.append(keyframe_labels(len(state), found, hz))
        counts.append(len(found))
    if not any(counts):
        raise ValueError(f"no sub-task ends in any of {len(episodes)} successes: look at gripper and position")
    config = ClassifierConfig(**options.model)
    frames = LabelledFrames(
        {c: np.concatenate([np.asarray(e.observations[c]) for e in episodes]) for c in features.cameras}, np.concatenate(labels),
        np.repeat(np.arange(len(episodes)), [len(rows) for rows in labels]),
        np.concatenate([e.observations[OBSERVATION_STATE][:, : config.state] for e in episodes]) if config.state else None,
    )  # fmt: skip
    reader = FrameFeatures(features)
    model, report = fit_classifier(frames, reader.encoder, config, budget, seed=options.seed)
    report.metrics["keyframes"] = float(np.mean(counts))
    return save_classifier(out, model, reader, keyframes=float(np.mean(counts))), report


def _preference(
    episodes: list[Episode], features: FeatureConfig, options: TrainOptions, budget: FitBudget, out: Path
) -> tuple[str, FitReport]:
    """Ask a VLM to compare frames of any episodes, successes or not, or read what people chose; and learn what was preferred."""
    from robot_rl.rewards.comparisons import read_comparisons, segment_pairs
    from robot_rl.rewards.preference import label_pairs, save_preferences
    from robot_rl.rewards.preference_model import PreferenceConfig, choose_pairs, fit_preferences
    from robot_rl.rewards.vlm.client import VlmClient
    from robot_rl.rewards.vlm.config import vlm_config

    if options.comparisons:
        reader = FrameFeatures(features)
        frames, chosen = segment_pairs(read_comparisons(options.comparisons), episodes, features.cameras)
        model, report = fit_preferences(reader(frames), chosen, PreferenceConfig(**options.model), budget, seed=options.seed)
        return save_preferences(out, model, reader), report
    goals = {e.meta.task or options.goal for e in episodes}
    if len(goals) != 1 or not next(iter(goals)):
        raise ValueError(
            f"episodes have the goals {sorted(goals)}: accepted is one goal for all of them (choose episodes, or give goal)"
        )
    rng, reader = np.random.default_rng(options.seed), FrameFeatures(features)
    config = PreferenceConfig(**options.model)
    items: dict[str, list[np.ndarray]] = {c: [] for c in features.cameras}
    share = max(2, min(200, 2 * options.pairs // max(len(episodes), 1)))
    for episode in episodes:
        at = np.sort(rng.choice(len(episode) + 1, min(share, len(episode) + 1), replace=False))
        for camera in features.cameras:
            items[camera].append(np.asarray(episode.observations[camera])[at])
    frames = {c: np.concatenate(v) for c, v in items.items()}
    count = len(frames[features.cameras[0]])
    views = [[frames[c][i] for c in features.cameras] for i in range(count)]
    with VlmClient(vlm_config(options.vlm)) as client:
        pairs, said = label_pairs(client, next(iter(goals)), views, choose_pairs(count, options.pairs, rng))
    if said.alarm:
        raise ValueError(
            f"the model contradicts itself: {said.agreed} of {said.swapped} pairs were ordered alike when the pictures were swapped; "
            "accepted is at least 60 %"
        )
    model, report = fit_preferences(reader(frames), pairs, config, budget, seed=options.seed)
    report.metrics |= {"asked": float(said.asked), "labelled": float(len(pairs.label)), "order_consistency": said.consistency}
    return save_preferences(out, model, reader), report


def _feedback(
    store: EpisodeStore, episodes: list[Episode], features: FeatureConfig, options: TrainOptions, budget: FitBudget, out: Path
) -> tuple[str, FitReport]:
    """Learn what a person said while they watched, from their readings in the reward log (GUIDE)."""
    from robot_rl.rewards.delay import recorded_readings
    from robot_rl.rewards.feedback import FeedbackConfig, fit_feedback, save_feedback

    def spoke(name: str) -> bool:
        return any(e.source == options.feedback and e.valid and e.kind is RewardKind.DENSE for e in store.rewards(name))

    heard = [e for e in episodes if spoke(e.meta.episode_id)]
    if len(heard) < 2:
        raise ValueError(
            f"feedback={options.feedback!r} spoke in {len(heard)} of {len(episodes)} episodes: accepted are at least 2, one is held out"
        )
    reader = FrameFeatures(features)
    rows = [reader({c: np.asarray(e.observations[c]) for c in features.cameras}) for e in heard]
    said = [recorded_readings(store, e, options.feedback) for e in heard]
    number = np.repeat(np.arange(len(heard)), [len(r) for r in rows])
    model, report = fit_feedback(
        np.concatenate(rows), np.concatenate(said), number, FeedbackConfig(**options.model), budget, seed=options.seed
    )
    return save_feedback(out, model, reader, report), report


def references(
    good: Sequence[Episode], every: Sequence[Episode], features: FeatureConfig, options: TrainOptions, out: Path
) -> tuple[str, FitReport]:
    """Files that ``video_similarity`` (``reference.npz``) and ``transport`` (``demonstration<k>.npz``) compare with; nothing is fitted."""
    from robot_rl.rewards.transport_source import save_demonstration
    from robot_rl.rewards.video_similarity import save_reference

    reader, report = FrameFeatures(features), FitReport()

    def rows(episode: Episode) -> np.ndarray:
        return reader({c: np.asarray(episode.observations[c])[:: options.every] for c in features.cameras})

    out.mkdir(parents=True, exist_ok=True)
    if options.kind == "video_similarity":
        save_reference(str(out / "reference.npz"), reader, rows(good[0]), [rows(e) for e in every])
        report.metrics["rollouts"] = float(len(every))
    else:
        if options.demonstrations < 1:
            raise ValueError(f"demonstrations={options.demonstrations}: accepted are integers >= 1")
        for k, episode in enumerate(good[: options.demonstrations]):
            save_demonstration(str(out / f"demonstration{k}.npz"), reader, rows(episode))
        report.metrics["demonstrations"] = float(min(len(good), options.demonstrations))
    return f"{options.kind}@{reader.model_id}", report


def _progress(
    episodes: list[Episode], features: FeatureConfig, options: TrainOptions, budget: FitBudget, out: Path
) -> tuple[str, FitReport]:
    nameless = [e.meta.episode_id for e in episodes if not e.meta.task]
    if nameless:
        raise ValueError(f"episodes {', '.join(nameless[:3])} name no task: accepted are episodes with an instruction")
    reader, text = FrameFeatures(features), build_text_encoder()
    tasks = {e.meta.task for e in episodes}
    clips = [
        Clip(
            reader({c: np.asarray(e.observations[c])[:: options.every] for c in features.cameras}),
            text.encode([e.meta.task])[0],
        )
        for e in episodes
    ]
    held = len(clips) // 5 if len(clips) >= 5 else 0
    order = np.random.default_rng(options.seed).permutation(len(clips))
    others = text.encode([t for t in OTHER_TASKS if t not in tasks])
    model, report = fit_progress(
        [clips[i] for i in order[held:]], ProgressConfig(**options.model), budget, others=others,
        held_out=[clips[i] for i in order[:held]], seed=options.seed,
    )  # fmt: skip
    return save_progress(out, model, reader, text), report
