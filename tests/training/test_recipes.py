"""Every recipe in ``configs/recipes`` runs end to end on tabletop/Lift: it acts, learns, publishes, is gated, and resumes exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_kit import merged, same_run, tiny

from robot_rl.config import load
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.training import final, posttrain, session
from robot_rl.training.config import PostTrainConfig, default_learner
from robot_rl.training.interrupt import Interrupted, InterruptFlag
from robot_rl.training.run_folder import RunFolder

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
NAMES = sorted(p.stem for p in RECIPES.glob("*.yaml"))
SMALL: dict[str, Any] = {
    "device": "cpu", "seed": 3, "threads": 1,
    "env": {"id": "tabletop/Lift", "num_envs": 2, "options": {"max_episode_steps": 24}},
    "gate": {"n_min": 2, "n_max": 2, "reference_n_min": 2},
    "stop": {"episodes": 1000},
    "evaluation": {"reference_episodes": 2, "curve_episodes": 2, "final_episodes": 2, "videos": 0},
    "logging": {"every_updates": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Demonstrations and a base policy that all recipes share."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    config = tiny(folder)
    posttrain._claim(RunFolder(folder), config)
    with InterruptFlag() as flag:
        posttrain.prepare_base(config, posttrain._env_spec(config), RunFolder(folder), posttrain.Silent(), flag, "cpu")
    return folder


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have their own tests and take longer than these runs."""
    monkeypatch.setattr(final, "write_report", lambda path: path / "report.html")
    monkeypatch.setattr(session, "OFFLINE_BLOCK", 2)


def shrunk(name: str, prepared: Path, run_dir: Path, extra: dict[str, Any] | None = None) -> PostTrainConfig:
    """The recipe as it is, but with small networks, short phases and few episodes."""
    full = load(PostTrainConfig, RECIPES / f"{name}.yaml")
    s = full.schedule
    small = {
        "offline_updates": min(s.offline_updates, 3), "return_updates": min(s.return_updates, 2),
        "warmup_updates": min(s.warmup_updates, 2), "warmup_gate_limit": 3, "warmup_steps": min(s.warmup_steps, 40), "updates_per_step": 0.1,
        "env_steps": 100, "round_episodes": 2, "batch_size": 8, "candidate_every": 60, "evaluate_every": 100,
        "checkpoint_every_s": 1000.0,
    }  # fmt: skip
    change: dict[str, Any] = {"schedule": small, "run_dir": str(run_dir), "base": {"path": str(prepared / "base")}}
    change["demos"] = {"source": "store", "path": str(prepared / "demos"), "prefill": full.demos.prefill}
    kinds = ("latent_noise", "residual", "gaussian_residual", "edit", "chunk_policy", "hybrid_policy", "one_step")
    change["head"] = {k: {"hidden": [8]} for k in kinds}
    change["curriculum"] = {"pool": 6, "window": 4, "components": [1, 2], "reset_window": 2, "arms": 2}
    if full.mixture.handover == "curriculum":
        change["mixture"] = {"handover_window": 2, "handover_decisions": 2}
    if full.learner.algorithm == "on_policy":
        sets = full.learner.advantage == "polychromic"
        small |= {"round_episodes": 4, "group_size": min(s.group_size, 4 if sets else 2)}
        change["learner"] = {
            "value_hidden": [8],
            "epochs": min(full.learner.epochs, 2),
            "critic_warmup_rounds": min(full.learner.critic_warmup_rounds, 1),
        }
        if sets:
            change["learner"]["set_size"] = 2
    elif full.learner.algorithm == "weighted_bc":
        change["learner"] = {"value_hidden": [8], "iw_draws": 2}
        if full.learner.weights == "recap":
            change["learner"]["recap"] = {"hidden": [8], "relabel_every": 3}
    elif full.learner.algorithm == "cqn":
        change["head"]["coarse_to_fine"] = {"hidden": 8, "atoms": 5}
    elif full.learner.algorithm in ("fixed", "distill"):
        small["updates_per_step"] = 0
    else:
        change["learner"] = {"hidden": [8], "actor_every": min(full.learner.actor_every, 3)}
        change["learner"]["conservative"] = {"samples": 2}
        if full.learner.student is not None:
            change["learner"]["student"] = {"hidden": [8], "tolerance": 10.0}
        if full.learner.critic == "prefix":
            change["learner"]["prefix"] = {"width": 8, "layers": 1, "heads": 2}
        if full.learner.support.model == "vae":
            change["learner"]["support"] = {"hidden": [8, 8], "updates": 2}
        if full.learner.optimism.strata:
            change["learner"]["optimism"] = {"hidden": [8], "features": 8, "start_updates": 1, "every": 2}
    content = merged(merged(SMALL, change), extra or {})
    path = run_dir.parent / f"{name}-small.yaml"
    path.write_text(yaml.safe_dump({"extends": str(RECIPES / f"{name}.yaml"), **content}))
    return load(PostTrainConfig, path)


class StopOnce:
    """Sets the interrupt flag after it has been asked ``left`` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left = left

        def asked(flag: InterruptFlag) -> bool:
            self.left -= 1
            flag._set = flag._set or self.left == 0
            return flag._set

        monkeypatch.setattr(InterruptFlag, "__call__", asked)


def run_recipe(name: str, prepared: Path, run_dir: Path, stop_at: int = 0) -> dict[str, Any]:
    """Play the recipe to its end; with ``stop_at`` it is interrupted once, by then, and resumed."""
    extra: dict[str, Any] = {}
    if name == "respect":
        earlier = run_dir.parent / "earlier"
        if not earlier.exists():
            posttrain.run(shrunk("policy_decorator", prepared, earlier))
        extra = {"learner": {"critic_init": str(earlier)}}
    if name == "compass":
        teachers = [run_dir.parent / f"teacher{i}" for i in range(2)]
        for i, teacher in enumerate(teachers):
            if not teacher.exists():  # every candidate is as good as a base that never succeeds, so one acts at the end
                posttrain.run(shrunk("dsrl_na", prepared, teacher, {"seed": i}))
        extra = {"learner": {"teachers": [str(t) for t in teachers]}}
    if name == "demo_diffusion":
        extra = {"head": {"reference": {"references": str(prepared / "demos"), "only_successful": False}}}
    if stop_at:
        with pytest.MonkeyPatch.context() as patch:
            StopOnce(patch, stop_at)
            with pytest.raises(Interrupted):
                posttrain.run(shrunk(name, prepared, run_dir, extra))
        assert not (run_dir / "result.json").exists()
    return posttrain.run(shrunk(name, prepared, run_dir, extra))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs_checkpoints_and_resumes(name: str, prepared: Path, tmp_path: Path) -> None:
    result = run_recipe(name, prepared, tmp_path / "run", 130)
    assert result["env_steps"] >= 100
    # Nobody succeeds here, so groups all end alike and teach nothing; some heads steer the base as they are.
    idle = ("ript", "sec", "ript_resets", "polychromic", "vls", "cdsa", "demo_diffusion")
    assert (result["updates"] > 0) == (name not in idle)
    judged = tmp_path / "run" / "gate.jsonl"
    gate = [json.loads(line) for line in judged.read_text().splitlines()] if judged.exists() else []
    assert bool({line["event"] for line in gate} & {"promoted", "rejected"}) == (name not in ("ript", "sec", "ript_resets")), (
        "a chain that nothing has taught is the base, and no candidate"
    )
    own = tmp_path / "run" / "base"  # of recipes that ask the base more often than it was made for
    same = posttrain.load_policy(own if own.exists() else prepared / "base").spec.base_hash
    assert result["base_hash"] == same, "the frozen base is still the frozen base"


QUICK = ("edit", "q_sharp", "cal_ql", "awr", "lora", "dsrl_na_fast")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_row_11_a_resumed_recipe_is_one_that_was_never_interrupted(name: str, prepared: Path, tmp_path: Path) -> None:
    run_recipe(name, prepared, tmp_path / "straight")
    run_recipe(name, prepared, tmp_path / "resumed", 130)
    same_run(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_means_the_same_on_top_of_any_task(name: str, tmp_path: Path) -> None:
    """Put on top of the quickstart, which is a recipe of its own, nothing of that recipe shines through."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"extends": [str(RECIPES.parent / "quickstart.yaml"), str(RECIPES / f"{name}.yaml")]}))
    alone, on_top = load(PostTrainConfig, RECIPES / f"{name}.yaml"), load(PostTrainConfig, path)
    assert on_top.learner == alone.learner
    assert getattr(on_top.head, on_top.head.kind, None) == getattr(alone.head, alone.head.kind, None)
    assert on_top.mixture == alone.mixture
    assert on_top.curriculum == alone.curriculum
    assert on_top.head.adapter == alone.head.adapter
    read = ["offline_updates", "warmup_acting", "warmup_perturbation"]
    if alone.learner.algorithm != "on_policy":  # which learns from whole rounds and keeps no buffer
        read += ["updates_per_step", "demo_ratio", "demo_ratio_end"]
    for key in read:
        assert getattr(on_top.schedule, key) == getattr(alone.schedule, key), key


@pytest.mark.parametrize("name", NAMES)
def test_a_newcomer_finds_the_recipe(name: str) -> None:
    """A page at most, opened by what it is; and a row of the table in docs/recipes.md."""
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 60
    assert f"`{name}`" in (RECIPES.parents[1] / "docs" / "recipes.md").read_text()


def test_offline_phase_is_interruptible_and_counts(prepared: Path, tmp_path: Path) -> None:
    """Ctrl-C between two blocks of offline updates: the rest is done after resuming, with the same result."""
    config = shrunk("cal_ql", prepared, tmp_path / "a", {"schedule": {"offline_updates": 6}})
    posttrain.run(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "_prepare", _interrupted_prepare)
        with pytest.raises(Interrupted):
            posttrain.run(shrunk("cal_ql", prepared, tmp_path / "b", {"schedule": {"offline_updates": 6}}))
    posttrain.run(shrunk("cal_ql", prepared, tmp_path / "b", {"schedule": {"offline_updates": 6}}))
    same_run(tmp_path / "a", tmp_path / "b")


def _interrupted_prepare(run: session.Session) -> None:
    run.flag._set = True
    PREPARE(run)


PREPARE = session.Session._prepare


def test_wsrl_keeps_nothing_and_plays_its_warm_up_with_the_offline_policy(prepared: Path, tmp_path: Path) -> None:
    """Frozen while it warms up: no update but the offline ones, and afterwards no row of a demonstration in any batch."""
    from robot_rl.training import learner_core

    drawn: list[dict[str, float]] = []
    train = learner_core.LearnerCore.train

    def spy(core, updates, update, on_update=None, ratios=None):
        if updates:
            drawn.append({str(getattr(k, "value", k)): v for k, v in (ratios or core._ratios()).items()})
        return train(core, updates, update, on_update, ratios)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_core.LearnerCore, "train", spy)
        posttrain.run(shrunk("wsrl", prepared, tmp_path / "run"))
    assert [d.get("online", 0.0) for d in drawn[:2]] == [0.0, 0.0]  # the offline phase, in two blocks
    assert all(d == {"online": 1.0, "demonstration": 0.0} for d in drawn[2:])
    assert len(drawn) > 3


def test_a_learner_process_does_the_offline_phase_and_publishes_what_chooses(prepared: Path, tmp_path: Path) -> None:
    """Beside the acting side: offline first, then a version whose critic comes along and whose choice is the learner's."""
    from robot_rl.runtime.weights import WeightChannel
    from robot_rl.training.build import build_head
    from robot_rl.training.learner_core import LearnerCore
    from robot_rl.training.learner_loop import LearnerLoop, LoopCounters
    from robot_rl.training.scalars import ScalarLog

    changes = {"schedule": {"learner": "process", "warmup_acting": "head", "offline_updates": 3}}
    config = shrunk("e2o", prepared, tmp_path / "run", changes)
    base, folder = posttrain.load_policy(prepared / "base"), RunFolder(tmp_path / "run")
    demos = posttrain.gather(config.demos, config.env, posttrain._env_spec(config), 3, folder, posttrain.Silent(), 1)
    scalars = ScalarLog(folder, config, job="learner")
    core = LearnerCore(config, base, demos, LoopCounters(), folder, scalars, "cpu")
    channel = WeightChannel(folder.weights)
    loop = LearnerLoop(core, [folder.store], channel, folder.learner, config.learner_process)
    while core.offline_left:
        assert loop.step()
    assert (core.learner.updates, core.learner.actor_updates) == (3, 1)
    (version,) = channel.versions()
    head = build_head(base, config.head, config.seed, config.learner)
    head.load_state_dict(channel.load(version))
    spec, g = base.spec, torch.Generator().manual_seed(0)
    c = torch.randn(3, spec.conditioning_dim, generator=g)
    noise = torch.randn(3, head.prior_draws, *spec.noise_shape, generator=g)
    own, published = (h.propose(c, base, noise, None, "eval") for h in (core.learner.head, head))
    assert torch.equal(own.chunk, published.chunk)
    assert torch.equal(own.info["q"], published.info["q"])
    scalars.close()


def test_without_a_recipe_the_winner_of_the_table_learns() -> None:
    """What nobody chose is `noise_gradient`, distilling only where a base gives no gradient."""
    default, winner = PostTrainConfig(), load(PostTrainConfig, RECIPES / "noise_gradient.yaml")
    assert isinstance(winner.learner, OffPolicyConfig)
    assert default.learner == replace(winner.learner, actor_gradient="auto")
    assert default.head == winner.head
    assert default.mixture == winner.mixture


def test_the_default_learner_does_not_shine_through_another_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"head": {"kind": "residual"}, "learner": {"algorithm": "residual", "gamma": 0.9}}))
    assert load(PostTrainConfig, path).learner == OffPolicyConfig(algorithm="residual", gamma=0.9)
    path.write_text(yaml.safe_dump({"learner": {"gamma": 0.9}}))
    assert load(PostTrainConfig, path).learner == replace(default_learner(), gamma=0.9)
