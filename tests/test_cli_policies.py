"""``robot-rl doctor POLICY`` and ``robot-rl serve``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spine_kit import compact, observations

from robot_rl import cli
from robot_rl.cli.policy_report import examine_policy, head_kinds
from robot_rl.policies.checkpoint import save_policy
from robot_rl.policies.loading import load_policy

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path) -> Path:
    save_policy(compact(), tmp_path / "policy")
    return tmp_path / "policy"


def test_doctor_says_which_heads_a_policy_supports_and_why(folder, capsys):
    assert cli.main(["doctor", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["sampler"], told["noise_shape"], told["kind"]) == ("ddim", [4, 3], "DiffusionPolicy")
    heads = {h["head"]: h for h in told["heads"]}
    assert tuple(heads) == head_kinds()
    assert [n for n, h in heads.items() if not h["supported"]] == ["token"]  # which writes words
    assert "dsrl_na" in heads["latent_noise"]["text"]
    assert cli.main(["doctor", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "reads     observation.state: float32 4" in shown
    assert "yes residual" in shown
    assert cli.main(["doctor", str(folder), "--options", "{"]) == 2
    assert "accepted is a JSON object" in capsys.readouterr().err
    assert cli.main(["doctor", str(folder.parent / "nothing")]) == 1
    assert "holds no policy" in capsys.readouterr().err


def test_doctor_gives_the_reason_where_a_head_does_not_fit(tmp_path):
    lerobot_kit = pytest.importorskip("lerobot") and _kit()
    report = examine_policy(str(lerobot_kit.act(tmp_path / "act", cameras=())))
    heads = {h.head: h for h in report.heads}
    assert report.noise_shape is None
    assert heads["residual"].supported
    assert heads["edit"].supported
    for name, why in {
        "latent_noise": "takes noise", "best_of_n": "takes noise", "fine_tuned": "does not hand them out", "chain": "does not hand",
    }.items():  # fmt: skip
        assert not heads[name].supported
        assert why in heads[name].text


def _kit():
    sys.path.append(str(ROOT / "tests" / "policies"))
    import lerobot_kit

    return lerobot_kit


def test_serve_until_told_to_stop(folder):
    command = [
        sys.executable,
        "-m",
        "robot_rl.cli",
        "serve",
        str(folder),
        "--port",
        "0",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        remote, base = load_policy(told["serving"]), compact()
        assert told["base"] == base.spec.base_hash
        seen, noise = observations(base, 2), torch.randn(2, *base.spec.noise_shape)
        chunk = remote.sample(remote.encode(seen), noise)
        torch.testing.assert_close(chunk, base.sample(base.encode(seen), noise), atol=1e-6, rtol=0)
        server.send_signal(signal.SIGTERM)
        out, _ = server.communicate(timeout=20)
        assert server.returncode == 0
        assert json.loads(out.splitlines()[-1])["questions"] == 2
    finally:
        server.kill()
        server.communicate()


def test_serve_refuses_an_open_port_without_a_token(folder, capsys, monkeypatch):
    monkeypatch.delenv("ROBOT_RL_POLICY_TOKEN", raising=False)
    assert cli.main(["serve", str(folder), "--host", "0.0.0.0", "--port", "0", "--device", "cpu"]) == 1
    assert "without a token" in capsys.readouterr().err
    assert cli.main(["serve", str(folder), "--port", "70000"]) == 2
