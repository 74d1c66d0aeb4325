"""openpi's websocket protocol, spoken to a server of the test's own."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

pytest.importorskip("msgpack")
pytest.importorskip("websockets")

from robot_rl.policies.loading import load_policy
from robot_rl.policies.remote.errors import PolicyUnavailable
from robot_rl.policies.remote.openpi import packb, unpackb

OPTIONS = {
    "observation": {"observation/state": "observation.state", "observation/image": "observation.images.top"},
    "features": {"observation.state": [4], "observation.images.top": [16, 16, 3]},
    "action": {"low": [-1, -2, 0], "high": [1, 2, 1]},
    "horizon": 5,
    "n_action_steps": 3,
    "prompt": "pick up the cup",
}


class Server:
    """What openpi's server does on the wire: metadata, then one answer a question; ``act`` makes the actions."""

    def __init__(self, act, port: int = 0, name: str = "pi0") -> None:
        from websockets.sync.server import serve

        self.asked: list[dict] = []

        def handle(line) -> None:
            line.send(packb({"name": name}))
            for frame in line:
                question = unpackb(frame)
                self.asked.append(question)
                answer = act(question)
                line.send(answer if isinstance(answer, str) else packb({"actions": answer, "server_timing": {"infer_ms": 1.0}}))

        self.server = serve(handle, "127.0.0.1", port, compression=None)
        self.port = self.server.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join(5)


def act(question: dict) -> np.ndarray:
    """Rows of openpi's padded width; only its first columns are this robot's."""
    out = np.zeros((10, 32), np.float64)
    out[:, :3] = question["observation/state"][:3] * 0.1 + 0.01 * np.arange(10)[:, None]
    out[:, 0] += question["observation/image"].mean() / 1000
    if "noise" in question:
        out[:5, :3] += 0.05 * question["noise"][:5, :3]
    return out


def seen(batch: int = 2) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    return {
        "observation.state": torch.from_numpy(rng.normal(size=(batch, 1, 4)).astype(np.float32)),
        "observation.images.top": torch.from_numpy(rng.integers(0, 256, (batch, 1, 16, 16, 3), np.uint8)),
    }


def test_a_chunk_an_observation_for_residual_heads():
    with Server(act) as server:
        base = load_policy(f"remote:openpi:127.0.0.1:{server.port}", options=OPTIONS)
        observation = seen()
        conditioning = base.encode(observation)
        assert conditioning.shape == (2, base.spec.conditioning_dim) == (2, 4 + 15)
        physical = base.unnormalize_action(base.sample(conditioning, None)).numpy()
        assert len(server.asked) == 2
        assert server.asked[0]["prompt"] == "pick up the cup"
        np.testing.assert_array_equal(server.asked[1]["observation/image"], observation["observation.images.top"][1, 0].numpy())
        for i, question in enumerate(server.asked):
            wanted = np.clip(act(question)[:5, :3], [-1, -2, 0], [1, 2, 1])
            np.testing.assert_allclose(physical[i], wanted, atol=1e-6)
        assert base.spec.noise_shape is None
        base.close()


def test_a_server_that_takes_noise_is_deterministic_in_it():
    with Server(act) as server:
        base = load_policy(f"remote:openpi:127.0.0.1:{server.port}", options=OPTIONS | {"noise": [10, 32]})
        assert base.spec.noise_shape == (10, 32)
        conditioning, noise = base.encode(seen()), torch.randn(2, 10, 32)
        assert not server.asked  # nothing to ask before there is noise
        chunk = base.sample(conditioning, noise)
        assert torch.equal(chunk, base.sample(conditioning, noise))
        assert not torch.equal(chunk, base.sample(conditioning, noise + 1))
        np.testing.assert_array_equal(server.asked[0]["noise"], noise[0].numpy())
        assert torch.isfinite(base.sample(torch.zeros(1, 4), noise[:1])).all()
        base.close()


def test_errors_gone_servers_and_other_policies_are_unavailable():
    failing = {"on": False}

    def sometimes(question):
        return "Traceback (most recent call last):\n  ...\nKeyError: 'observation/wrist'" if failing["on"] else act(question)

    with Server(sometimes) as server:
        base = load_policy(f"remote:openpi:127.0.0.1:{server.port}", options=OPTIONS)
        failing["on"] = True
        with pytest.raises(PolicyUnavailable, match="KeyError: 'observation/wrist'"):
            base.encode(seen())
        failing["on"] = False
        assert base.encode(seen()).shape == (2, 19)
        port = server.port
    for _ in range(2):
        with pytest.raises(PolicyUnavailable, match="openpi server"):
            base.encode(seen())
    with Server(act, port):
        assert base.encode(seen()).shape == (2, 19)
    with Server(act, port, name="another"):
        for _ in range(2):
            with pytest.raises(PolicyUnavailable):
                base.encode(seen())
    with Server(lambda q: np.full((2, 3), 0.1)) as short:
        base = load_policy(f"remote:openpi:127.0.0.1:{short.port}", options=OPTIONS)
        with pytest.raises(PolicyUnavailable, match=r"actions of shape \(2, 3\); needed are finite \(5, 3\)"):
            base.encode(seen())
    with pytest.raises(PolicyUnavailable):
        load_policy(f"remote:openpi:127.0.0.1:{port}", options=OPTIONS | {"connect_s": 0.5})


def test_what_openpi_does_not_tell_must_be_told():
    with pytest.raises(
        ValueError, match="openpi's server does not tell observation, features, action, horizon, n_action_steps"
    ):
        load_policy("remote:openpi:127.0.0.1:9")
    with pytest.raises(ValueError, match=r"observation: \['observation.wrist'\] are not in features"):
        load_policy("remote:openpi:127.0.0.1:9", options=OPTIONS | {"observation": {"x": "observation.wrist"}})
    with pytest.raises(ValueError, match="unknown option 'promt'"):
        load_policy("remote:openpi:127.0.0.1:9", options=OPTIONS | {"promt": "x"})


def test_frames_hold_numbers_only():
    import msgpack

    value = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float64(2.5), "c": ["x", 1, None]}
    found = unpackb(packb(value))
    np.testing.assert_array_equal(found["a"], value["a"])
    assert (found["b"], found["c"]) == (2.5, ["x", 1, None])
    with pytest.raises(TypeError, match="does not travel"):
        packb({"a": np.array(["text"])})
    bad = {b"__ndarray__": True, b"data": b"12345678", b"dtype": "|O8", b"shape": [1]}
    with pytest.raises((ValueError, TypeError)):
        unpackb(msgpack.packb(bad))
