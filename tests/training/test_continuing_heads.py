"""Every kind of head over a policy that hands out its sampler: it continues a running chunk, or says that it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from spine_kit import STATE, compact

from robot_rl.config import decode
from robot_rl.learners.config import OffPolicyConfig
from robot_rl.runtime.acting import ActingPolicy, DecisionRequest
from robot_rl.runtime.chunk_scheduler import RunningChunk
from robot_rl.training.build import build_head
from robot_rl.training.config import HeadConfig

SMALL = {"hidden": [16]}
CONTINUE = {
    "latent_noise": SMALL, "residual": SMALL, "gaussian_residual": SMALL, "edit": SMALL | {"candidates": 3, "edits": 2},
    "edit of its own base": SMALL | {"candidates": 3, "edits": 2, "own_base": True}, "best_of_n": {"candidates": 4},
    "best_of_n of its own base": {"candidates": 4, "own_base": True}, "fine_tuned": None, "advantage_conditioned": {},
    "distilled": {"student": "residual", "slots": 2},
}  # fmt: skip
BEGIN_ANEW = {"chunk_policy": SMALL, "one_step": SMALL, "coarse_to_fine": {"hidden": 16}, "chain": {}}


def acting(which: str, parts: dict | None, mode: str) -> ActingPolicy:
    kind = which.split(" ")[0]
    base = compact("flow", state=3)
    config = decode(HeadConfig, {"kind": kind} | ({} if parts is None else {kind: parts}))
    return ActingPolicy(base, build_head(base, config, 0, OffPolicyConfig()), mode, 1)


def request(running: RunningChunk | None = None) -> DecisionRequest:
    return DecisionRequest({STATE: np.full((1, 3), 0.2, np.float32)}, ("test", 1), 0, 5, running)


@pytest.mark.parametrize("mode", ["explore", "eval"])
@pytest.mark.parametrize("which", list(CONTINUE))
def test_it_continues_what_runs(which: str, mode: str) -> None:
    policy = acting(which, CONTINUE[which], mode)
    assert policy.cannot_continue() == ""
    rows = np.tile(np.array([0.3, -0.5, 0.4], np.float32), (3, 1))
    found = policy.decide([request(RunningChunk(rows, rows, 2)), request()])
    for chunk in (found[0].chunk, found[0].chunk_base):
        assert chunk[:2].tobytes() == rows[:2].tobytes()
        assert np.isfinite(chunk).all()
    plain = policy.decide([request()])[0]
    np.testing.assert_allclose(found[1].chunk, plain.chunk, atol=1e-5)
    assert not np.allclose(found[0].chunk_base[2:], plain.chunk_base[2:], atol=1e-3), "what follows was drawn knowing them"


@pytest.mark.parametrize("which", list(BEGIN_ANEW))
def test_it_says_that_it_cannot(which: str) -> None:
    policy = acting(which, BEGIN_ANEW[which], "eval")
    assert policy.cannot_continue().startswith(f"a {which} head does not act through the base's sampler")
    assert np.isfinite(policy.decide([request()])[0].chunk).all()
