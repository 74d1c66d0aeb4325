"""The demonstrations of a run: scripted, imported, or already in a store."""

from __future__ import annotations

from robot_rl.paths import find_recording
from robot_rl.progress import Progress
from robot_rl.replay.importers import open_dataset
from robot_rl.replay.store import EpisodeStore
from robot_rl.sim.collect import CollectConfig, collect
from robot_rl.sim.env import EnvSpec
from robot_rl.training.config import DemosConfig, EnvConfig
from robot_rl.training.run_folder import RunFolder
from robot_rl.types import Episode


class _Counting:
    """A store that moves the progress bar."""

    def __init__(self, store: EpisodeStore, progress: Progress) -> None:
        self.store, self.progress = store, progress

    def add(self, episode: Episode) -> str:
        self.progress.advance(1)
        return self.store.add(episode)


def gather(config: DemosConfig, env: EnvConfig, spec: EnvSpec, seed: int, folder: RunFolder, progress: Progress, workers: int) -> list[Episode]:
    """All demonstrations of a run as episodes; those made or imported here are kept in ``demos/`` of the run folder.

    A half-made ``demos/`` (the run was killed) is completed from the start: collection depends on the seed alone.

    Raises:
        ValueError: the recording does not fit the task (the message names the feature or the action).
    """
    if config.source == "store":
        assert config.path is not None
        with EpisodeStore.open(config.path, mode="r") as store:
            episodes = [store.read(i) for i in store.episode_ids()]
        return _checked(episodes, spec, str(config.path))
    done = folder.demos / "complete"
    if not done.exists():
        _remove(folder)
        store = EpisodeStore.create(folder.demos, observation_features=spec.observation_features, action=spec.action, sync=False)
        with store:
            progress.start("demonstrations", config.episodes if config.source == "expert" else None)
            sink = _Counting(store, progress)
            if config.source == "expert":
                report = collect(
                    CollectConfig(
                        env.id, config.episodes, config.skill, config.noise, seed, config.only_successful, workers, env_options=env.options
                    ),
                    sink,
                )
                progress.log(
                    f"demonstrations: {report.episodes} episodes, {report.success_rate:.0%} of {report.attempts} attempts succeeded"
                )
            else:
                assert config.path is not None
                importer = open_dataset(find_recording(config.path), config.format, **config.options)
                for episode in importer.episodes():
                    sink.add(_checked([episode], spec, str(config.path))[0])
        done.touch()
    with EpisodeStore.open(folder.demos, mode="r") as store:
        return [store.read(i) for i in store.episode_ids()]


def _remove(folder: RunFolder) -> None:
    import shutil

    shutil.rmtree(folder.demos, ignore_errors=True)


def _checked(episodes: list[Episode], spec: EnvSpec, where: str) -> list[Episode]:
    for episode in episodes:
        for name, feature in spec.observation_features.items():
            rows = episode.observations.get(name)
            if rows is None or rows.shape[1:] != feature.shape:
                found = "missing" if rows is None else f"of shape {rows.shape[1:]}"
                raise ValueError(f"{where}: episode {episode.meta.episode_id}: {name} is {found}; the task {spec.env_id} has {feature.shape}")
        if episode.action.shape[1] != spec.action.dim:
            raise ValueError(
                f"{where}: episode {episode.meta.episode_id}: actions have {episode.action.shape[1]} dimensions; the task "
                f"{spec.env_id} has {spec.action.dim}"
            )
    return episodes
