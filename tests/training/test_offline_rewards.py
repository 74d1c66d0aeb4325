"""Recorded episodes, a reward worked out afterwards, IQL or weighted cloning on it: the whole path, with tiny networks."""

from __future__ import annotations

import json

import pytest
import yaml
from run_kit import TINY, merged

from robot_rl.cli import main
from robot_rl.config import load
from robot_rl.replay import EpisodeStore
from robot_rl.training.config import PostTrainConfig

WAYS = {"iql": {"offline_actor": True}, "awr": {"weights": "iql"}}
OFFLINE = {
    "schedule": {
        "offline_updates": 12, "env_steps": 1, "round_episodes": 2, "warmup_steps": 0, "warmup_acting": "head", "return_updates": 0,
        "warmup_updates": 0, "updates_per_step": 0.0, "demo_ratio": 1.0, "demo_ratio_end": 1.0, "candidate_every": 1,
    },
    "demos": {"source": "store", "prefill": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(WAYS))
def test_relabelled_episodes_train_a_policy_without_new_ones(recipe: str, tmp_path, capsys):
    recorded, rewarded = tmp_path / "recorded", tmp_path / "rewarded"
    assert main(["collect", f"--store={recorded}", "--env_id=tabletop/Lift", "--episodes=8", "--skill=0.6", "--quiet"]) == 0
    block = {"channels": [{"source": "label", "kind": "success", "weight": 3.0}]}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"reward": block}))
    words = [
        "reward",
        "apply",
        str(recorded),
        "--reward",
        str(tmp_path / "reward.yaml"),
        "--gamma",
        "0.99",
        "--out",
        str(rewarded),
    ]
    assert main([*words, "--json"]) == 0
    with EpisodeStore.open(rewarded) as store:
        ends = [float(store.read(n).reward[-1]) for n in store.episode_ids()]
    assert set(ends) == {0.0, 3.0}
    run = merged({k: v for k, v in TINY.items() if k not in ("head", "learner", "mixture")}, OFFLINE)
    run = merged(run, {"demos": {"path": str(rewarded)}, "run_dir": str(tmp_path / "run"), "learner": WAYS[recipe]})
    run["demos"] = {k: v for k, v in run["demos"].items() if k in ("source", "path", "prefill")}
    config = tmp_path / "offline.yaml"
    config.write_text(yaml.safe_dump({"extends": f"recipes/{recipe}.yaml"} | run))
    learner = load(PostTrainConfig, config).learner
    assert (learner.offline_critic if recipe == "iql" else learner.weights) == "iql"
    capsys.readouterr()
    assert main(["train", "--config", str(config), "--json"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(1 for line in lines if line["env_steps"] == 0) >= 1  # learned before anything was played
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["updates"] == 12
    assert result["env_steps"] <= 60
