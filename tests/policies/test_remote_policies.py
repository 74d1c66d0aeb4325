"""A policy behind a server: the same chunks, batches of robots, tokens, and what a robot sees when the server is gone."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
import torch
from spine_kit import compact, observations

from robot_rl.heads.config import LatentNoiseConfig
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.loading import load_policy, write_reference
from robot_rl.policies.remote.batching import Batcher
from robot_rl.policies.remote.client import RemotePolicy
from robot_rl.policies.remote.connecting import parse
from robot_rl.policies.remote.errors import MessageError, PolicyUnavailable
from robot_rl.policies.remote.messages import pack, receive, unpack
from robot_rl.policies.remote.server import PolicyServer

TOKEN = "a-token-of-enough-characters"


@pytest.fixture
def base():
    return compact(images=True, n_obs_steps=2)


@pytest.fixture
def server(base):
    with PolicyServer(base, port=0) as running:
        yield running


def at(server: PolicyServer) -> str:
    return f"remote:{server.address[0]}:{server.address[1]}"


def test_a_served_policy_is_the_policy(base, server):
    remote = load_policy(at(server))
    assert isinstance(remote, BasePolicy)
    assert remote.spec == base.spec
    seen, noise = observations(base, 5), torch.randn(5, *base.spec.noise_shape)
    conditioning = remote.encode(seen)
    assert torch.equal(conditioning, base.encode(seen))
    chunk = remote.sample(conditioning, noise)
    assert torch.equal(chunk, base.sample(base.encode(seen), noise))
    assert not torch.equal(chunk, remote.sample(conditioning, noise + 0.5))  # the noise goes all the way
    torch.testing.assert_close(remote.unnormalize_action(chunk), base.unnormalize_action(chunk), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(remote.normalize_action(base.unnormalize_action(chunk)), chunk, atol=1e-5, rtol=0)
    head = LatentNoiseHead(base, LatentNoiseConfig())
    here = head.propose(conditioning, base, noise, None, "eval").chunk
    assert torch.equal(here, head.propose(conditioning, remote, noise, None, "eval").chunk)
    with pytest.raises(KeyError, match="lacks"):
        remote.encode({})


def test_an_observation_is_encoded_once(base, server):
    remote = load_policy(at(server))
    seen = observations(base, 3)
    first = remote.encode(seen)
    assert torch.equal(remote.encode({k: v.flip(0) for k, v in seen.items()}), first.flip(0))
    counts = remote.status()
    assert (counts["encoded"], counts["cached"]) == (3, 3)


def test_robots_that_ask_while_the_policy_is_busy_are_answered_together(base):
    gate, entered = threading.Event(), threading.Event()
    sizes = []

    class Slow:
        spec = base.spec

        def encode(self, observation):
            entered.set()
            assert gate.wait(10)
            sizes.append(len(next(iter(observation.values()))))
            return base.encode(observation)

        sample = staticmethod(base.sample)

    batcher = Batcher(Slow(), max_rows=6)
    seen = [{n: v.numpy() for n, v in observations(base, 1, seed=i).items()} for i in range(9)]
    answers = [batcher.ask("encode", seen[0])]
    assert entered.wait(10)
    answers += [batcher.ask("encode", s) for s in seen[1:]]
    gate.set()
    found = [a.result(10)["conditioning"] for a in answers]
    batcher.close()
    assert sizes == [1, 6, 2]
    for one, s in zip(found, seen, strict=True):  # each robot has its own answer
        alone = base.encode({n: torch.from_numpy(v) for n, v in s.items()}).numpy()
        np.testing.assert_allclose(one, alone, atol=1e-5)
    with pytest.raises(RuntimeError, match="stopping"):
        batcher.ask("encode", seen[0])


def test_what_does_not_fit_is_refused_and_the_line_stays_up(base, server):
    remote = load_policy(at(server))
    seen = observations(base, 2)
    with pytest.raises(PolicyUnavailable, match=r"noise is float32 \(9, 9\); accepted is float32 \(4, 3\)"):
        remote.sample(remote.encode(seen), torch.zeros(2, 9, 9))
    with pytest.raises(PolicyUnavailable, match="all arrays have one row a robot"):
        remote.sample(remote.encode(seen), torch.zeros(3, *base.spec.noise_shape))
    assert remote.encode(seen).shape == (2, base.spec.conditioning_dim)


def test_a_server_that_dies_is_unavailable_at_once_and_found_again(base):
    server = PolicyServer(base, port=0)
    remote = load_policy(at(server))
    seen = observations(base, 1)
    kept = remote.encode(seen)
    server.close()
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(PolicyUnavailable, match=r"policy server 127\.0\.0\.1:\d+"):
            remote.encode(seen)
        assert time.monotonic() - began < 1.5
    with PolicyServer(base, port=server.address[1]):
        assert torch.equal(remote.encode(seen), kept)
    with PolicyServer(compact(images=True, n_obs_steps=2, seed=1), port=server.address[1]):
        with pytest.raises(PolicyUnavailable, match=r"closed|reset|Broken|now serves"):
            remote.encode(seen)  # the line of the server before
        with pytest.raises(PolicyUnavailable, match=r"it now serves policy .* this session began with"):
            remote.encode(seen)
    with pytest.raises(PolicyUnavailable):
        load_policy(at(server))


def test_a_server_that_hangs_costs_one_timeout_and_its_late_answer_is_not_taken_for_the_next(base):
    class Hanging:
        spec = base.spec
        hang = threading.Event()
        sample = staticmethod(base.sample)
        unnormalize_action = staticmethod(base.unnormalize_action)

        def encode(self, observation):
            if self.hang.is_set():
                time.sleep(0.6)
            return base.encode(observation)

    policy = Hanging()
    with PolicyServer(policy, port=0) as server:
        remote = load_policy(at(server), options={"timeout_s": 0.3})
        one, two = observations(base, 1, seed=1), observations(base, 1, seed=2)
        policy.hang.set()
        with pytest.raises(PolicyUnavailable, match="timed out"):
            remote.encode(one)
        policy.hang.clear()
        time.sleep(0.5)
        assert torch.equal(remote.encode(two), base.encode(two))


def test_a_policy_that_fails_leaves_the_server_standing(base):
    class Failing:
        spec = base.spec
        sample = staticmethod(base.sample)
        unnormalize_action = staticmethod(base.unnormalize_action)
        encode = staticmethod(lambda observation: 1 / 0)

    with PolicyServer(Failing(), port=0) as server:
        remote = load_policy(at(server))
        for _ in range(2):
            with pytest.raises(PolicyUnavailable, match="the policy failed: ZeroDivisionError"):
                remote.encode(observations(base, 1))


def test_tokens(base, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"host='0\.0\.0\.0' without a token"):
        PolicyServer(base, host="0.0.0.0", port=0)
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    with PolicyServer(base, host="0.0.0.0", port=0, token=TOKEN) as server:
        where = f"remote:127.0.0.1:{server.address[1]}"
        with pytest.raises(PolicyUnavailable, match="a token is needed"):
            load_policy(where)
        monkeypatch.setenv("ROBOT_RL_POLICY_TOKEN", TOKEN[:-1] + "?")
        with pytest.raises(PolicyUnavailable, match="a token is needed"):
            load_policy(where)
        assert load_policy(where, options={"token_file": str(file)}).spec == base.spec
        file.chmod(0o644)
        with pytest.raises(PermissionError, match="can be read by others"):
            load_policy(where, options={"token_file": str(file)})
        monkeypatch.setenv("ROBOT_RL_POLICY_TOKEN", "short")
        with pytest.raises(ValueError, match="ROBOT_RL_POLICY_TOKEN: accepted are at least 16"):
            load_policy(where)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        (1 << 60).to_bytes(8, "little"),
        pack({"protocol": 99}),
        (30).to_bytes(8, "little") + (1 << 30).to_bytes(4, "little") + b"x" * 26,
    ],
)
def test_nonsense_on_the_port_ends_that_connection_only(base, server, nonsense):
    with socket.create_connection(server.address, 2) as line:
        line.sendall(nonsense)
        line.settimeout(8)
        line.recv(4096)
    assert load_policy(at(server)).spec == base.spec


def test_messages_keep_every_bit_and_refuse_what_is_none():
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(2, 3)).astype(np.float32), "b": np.zeros((0, 4), np.uint8), "c": rng.integers(0, 9, (3,))}
    head, found = unpack(pack({"op": "x"}, arrays)[8:])
    assert head["op"] == "x"
    assert all(np.array_equal(found[n], a) and found[n].dtype == a.dtype for n, a in arrays.items())
    with pytest.raises(MessageError, match="complex128"):
        pack({}, {"a": np.zeros(2, complex)})
    whole = pack({}, arrays)[8:]
    for damaged in (
        whole[:-1],
        whole + b"x",
        whole.replace(b"<f4", b"|O8"),
        whole.replace(b"[2, 3]", b"[9, 9]"),
        b"\x02\0\0\0[]",
    ):
        with pytest.raises(MessageError):
            unpack(damaged)
    a, b = socket.socketpair()
    a.sendall(b"\xff" * 8)
    with pytest.raises(MessageError, match="accepted are at most"):
        receive(b)
    a.close()
    b.close()


def test_addresses():
    assert parse("remote:robot-gpu:8765") == ("robot_rl", "robot-gpu", 8765)
    assert parse("remote:[::1]:9") == ("robot_rl", "::1", 9)
    assert parse("remote:openpi:10.0.0.2:8000") == ("openpi", "10.0.0.2", 8000)
    assert parse("remote:lerobot:gpu-box:8080") == ("lerobot", "gpu-box", 8080)
    for wrong in ("remote:", "remote:host", "remote:host:99999", "remote:other:host:1"):
        with pytest.raises(ValueError, match="accepted is remote:HOST:PORT"):
            parse(wrong)
    with pytest.raises(ValueError, match="unknown option 'timeout'"):
        load_policy("remote:127.0.0.1:9", options={"timeout": 1})


def test_a_run_folder_refers_to_a_server(base, server, tmp_path):
    remote = load_policy(at(server))
    write_reference(remote, tmp_path / "base", at(server), {"timeout_s": 1.0})
    again = load_policy(tmp_path / "base")
    assert isinstance(again, RemotePolicy)
    assert again.spec.base_hash == base.spec.base_hash


def test_what_a_server_says_is_one_line_of_a_log() -> None:
    said = str(PolicyUnavailable("the policy server h:1: fine\n[INFO] all is well\x1b[2J é" + 5000 * "x"))
    assert "\n" not in said
    assert "\x1b" not in said
    assert "fine\\n[INFO]" in said
    assert "é" in said
    assert len(said) < 1100
