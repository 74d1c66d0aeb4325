"""What the buffer draws is what the window rule says, from the strata asked for, whatever happened before."""

from __future__ import annotations

import zlib
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_rl.replay import EmptyBufferError, ReplayBuffer, WindowConfig
from robot_rl.replay.sampling import CODE, interleave
from robot_rl.replay.windows import EpisodeArrays, decision_starts, final_observation_known, window
from robot_rl.types import Decision, Episode, EpisodeMeta, FeatureSpec, RewardEvent, RewardKind, Source, Stratum

C, A, N, H = 4, 3, 5, 6
DELTA = np.array([True, False, False])


def episode(
    rng, name: str, length: int, *, stratum=Stratum.ONLINE, terminated=True, messy=True, human=False, **more
) -> Episode:
    source = np.zeros(length, np.uint8)
    if messy:
        source = np.where(rng.random(length) < 0.1, rng.integers(0, 6, length), 0)
    if human:
        source[length // 2 :] = Source.HUMAN
    reward = np.where(rng.random(length) < 0.05 * messy, np.nan, rng.normal(size=length))
    decisions = [Decision(t, rng.normal(size=(2, A)).astype("f4"), *np.zeros((2, H, A), "f4")) for t in range(0, length, 4)]
    end = np.arange(length) == length - 1
    return Episode.from_arrays(
        EpisodeMeta(name, stratum=stratum, **more),
        {},
        rng.normal(size=(length, A)),
        reward=reward,
        source=source,
        terminated=end & terminated,
        truncated=end & (not terminated),
        decision_id=np.arange(length) // 4,
        chunk_row=np.arange(length) % 4,
        decisions=decisions,
    )


def new_buffer(capacity: int = 1000, n: int = N, gamma: float = 0.9, **options) -> ReplayBuffer:
    window = WindowConfig(n, gamma, options.pop("stride", "any"), options.pop("mode", "per_step"))
    options = {"noise_shape": (2, A), "chunk_horizon": H, **options}
    return ReplayBuffer(capacity, conditioning_dim=C, action_dim=A, window=window, delta_mask=DELTA, **options)


def put(buffer: ReplayBuffer, ep: Episode, *, chunks=True, base=True, **options) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(zlib.crc32(ep.action.tobytes()))
    given = {
        "conditioning": rng.normal(size=(len(ep) + 1, C)).astype("f4"),
        "action": ep.action,
        "action_base": rng.normal(size=(len(ep), A)).astype("f4") if base else None,
        "chunks": rng.normal(size=(len(ep.decisions), H, A)).astype("f4") if chunks else None,
    }
    buffer.add(ep, **given, **options)
    return given


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 9), stride=st.sampled_from(["any", "decision"]),
    mode=st.sampled_from(["per_step", "per_chunk_sum"]), chunks=st.booleans(), capacity=st.integers(60, 200),
)  # fmt: skip
def test_a_batch_is_the_reference_row_by_row(seed, n, stride, mode, chunks, capacity):
    rng = np.random.default_rng(seed)
    buffer = new_buffer(capacity, n, stride=stride, mode=mode)
    known = {}
    for i in range(12):
        ep = episode(rng, f"e{i}", int(rng.integers(1, 40)), terminated=bool(i % 2), recovered=bool(i % 3 == 0))
        known[ep.meta.episode_id] = (ep, put(buffer, ep, chunks=chunks))
    assert sum(len(known[i][0]) + 1 for i in buffer.episode_ids()) <= capacity
    assert buffer.episode_ids() == [f"e{i}" for i in range(12)][-len(buffer.episode_ids()) :]
    if not buffer.total_starts:
        return
    batch = buffer.sample(64, np.random.default_rng(seed))
    for b in range(len(batch)):
        ep, given_ = known[buffer.episode_id(batch.episode_index[b])]
        t = int(batch.step[b])
        starts = decision_starts(ep)
        arrays = EpisodeArrays(ep.action, ep.reward, ep.source, bool(ep.terminated[-1]), DELTA, final_observation_known(ep),
                               ep.decision_id, starts, given_["chunks"])  # fmt: skip
        expected = window(arrays, t, n, 0.9, mode)
        assert expected.weight == batch.weight[b] == 1.0
        np.testing.assert_array_equal(batch.mask[b], expected.mask)
        np.testing.assert_array_equal(batch.action[b], expected.action)
        np.testing.assert_allclose(batch.reward[b], expected.reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.discount[b], expected.discount, rtol=1e-6)
        np.testing.assert_array_equal(batch.conditioning[b], given_["conditioning"][t])
        np.testing.assert_array_equal(batch.next_conditioning[b], given_["conditioning"][expected.next_step])
        assert batch.is_decision[b] == starts[t]
        noise = ep.decisions[ep.decision_id[t]].noise if starts[t] else np.zeros((2, A))
        np.testing.assert_array_equal(batch.noise[b], noise)
        for got, first in ((batch.action_base, t), (batch.next_action_base, expected.next_step)):
            base = given_["action_base"]
            for i in range(n):
                row = base[first + i] if first + i < len(ep) else np.where(DELTA, 0, base[-1])
                np.testing.assert_array_equal(got[b, i], row)
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            assert value.dtype == np.float32, f.name


def test_every_valid_window_and_no_other_is_drawn():
    rng = np.random.default_rng(0)
    buffer = new_buffer(n=3)
    expected = set()
    for i in range(5):
        ep = episode(rng, f"e{i}", 12, terminated=bool(i % 2))
        put(buffer, ep)
        arrays = EpisodeArrays(ep.action, ep.reward, ep.source, bool(ep.terminated[-1]), DELTA)
        expected |= {(i, t) for t in range(12) if window(arrays, t, 3, 0.9).weight}
    batch = buffer.sample(20_000, rng)
    drawn, counts = np.unique(np.stack([batch.episode_index, batch.step]), axis=1, return_counts=True)
    assert set(map(tuple, drawn.T.tolist())) == expected
    assert buffer.total_starts == len(expected)
    assert counts.max() / counts.min() < 1.6, "uniform over windows"


def test_ratios_hold_in_every_slice():
    rng = np.random.default_rng(0)
    buffer = new_buffer()
    for i, stratum in enumerate([Stratum.ONLINE, Stratum.DEMONSTRATION, Stratum.ONLINE, Stratum.PRIOR]):
        put(buffer, episode(rng, f"e{i}", 30, stratum=stratum, messy=False))
    batch = buffer.sample(256, rng, {"online": 0.5, Stratum.DEMONSTRATION: 0.25, Stratum.PRIOR: 0.25})
    for part in np.split(batch.stratum, 8):
        assert [int((part == CODE[s]).sum()) for s in (Stratum.ONLINE, Stratum.DEMONSTRATION, Stratum.PRIOR)] == [16, 8, 8]
    for code, index in zip(batch.stratum.tolist(), batch.episode_index.tolist(), strict=True):
        own = {0: Stratum.ONLINE, 1: Stratum.DEMONSTRATION, 2: Stratum.ONLINE, 3: Stratum.PRIOR}[index]
        assert code == CODE[own]
    # An empty stratum's share goes to the others in proportion to theirs.
    batch = buffer.sample(90, rng, {Stratum.ONLINE: 0.2, Stratum.DEMONSTRATION: 0.1, Stratum.INTERVENTION: 0.7})
    assert (batch.stratum == CODE[Stratum.ONLINE]).sum() == 60
    with pytest.raises(EmptyBufferError, match="intervention"):
        buffer.sample(8, rng, {Stratum.INTERVENTION: 1})
    with pytest.raises(ValueError, match="ratios"):
        buffer.sample(8, rng, {Stratum.ONLINE: -1})
    with pytest.raises(ValueError, match="onlin"):
        buffer.sample(8, rng, {"onlin": 1})
    with pytest.raises(EmptyBufferError):
        new_buffer().sample(8, rng)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_interleaving_keeps_shares_in_every_prefix(shares, size):
    pattern = interleave(size, tuple(shares))
    weights = np.array(shares) / np.sum(shares)
    for end in range(1, size + 1):
        assert np.abs(np.bincount(pattern[:end], minlength=len(shares)) - weights * end).max() < len(shares)


def test_interventions_are_lent():
    rng = np.random.default_rng(0)
    buffer = new_buffer(n=2)
    put(buffer, episode(rng, "auto", 20, messy=False))
    put(buffer, episode(rng, "helped", 20, messy=False, human=True))
    assert buffer.starts() == {Stratum.ONLINE: 40, Stratum.DEMONSTRATION: 0, Stratum.INTERVENTION: 10, Stratum.PRIOR: 0}
    batch = buffer.sample(40, rng, {Stratum.ONLINE: 1, Stratum.INTERVENTION: 1})
    lent = batch.stratum == CODE[Stratum.INTERVENTION]
    assert lent.sum() == 20
    assert (batch.episode_index[lent] == 1).all()
    assert (batch.step[lent] >= 10).all()
    buffer.remove("helped")
    assert buffer.starts()[Stratum.INTERVENTION] == 0


def test_online_data_makes_room_first():
    rng = np.random.default_rng(0)
    buffer = new_buffer(100)
    for i, stratum in enumerate([Stratum.DEMONSTRATION, Stratum.ONLINE, Stratum.ONLINE, Stratum.PRIOR]):
        put(buffer, episode(rng, f"e{i}", 24, stratum=stratum))
    assert buffer.episode_ids() == ["e0", "e1", "e2", "e3"]
    put(buffer, episode(rng, "e4", 30))
    assert buffer.episode_ids() == ["e0", "e3", "e4"]
    put(buffer, episode(rng, "e5", 99))
    assert buffer.episode_ids() == ["e5"]
    assert buffer.evicted_episodes == 5
    with pytest.raises(ValueError, match="capacity=100"):
        put(buffer, episode(rng, "e6", 100))
    with pytest.raises(ValueError, match="already"):
        put(buffer, episode(rng, "e5", 9))
    with pytest.raises(ValueError, match="ends"):
        put(buffer, episode(rng, "e7", 50), ends=np.zeros(49, bool))
    assert buffer.episode_ids() == ["e5"], "who is refused costs nobody a place"


def test_long_history_and_rebuild_draw_the_same():
    """After thousands of evictions and compactions a buffer samples like one that was just filled with what it holds."""
    rng = np.random.default_rng(0)
    old, made = new_buffer(400), {}
    strata = [Stratum.ONLINE] * 6 + [Stratum.DEMONSTRATION, Stratum.INTERVENTION]
    for i in range(400):
        ep = episode(rng, f"e{i}", int(rng.integers(1, 60)), stratum=strata[i % 8], human=i % 5 == 0)
        made[ep.meta.episode_id] = ep
        put(old, ep)
        if i % 7 == 0:
            old.set_rewards(old.episode_ids()[0], np.array([np.nan]))
            made[old.episode_ids()[0]].reward[0] = np.nan
        if i % 11 == 0 and len(old.episode_ids()) > 2:
            old.remove(old.episode_ids()[1])
    new = new_buffer(400)
    for name in old.episode_ids():
        put(new, made[name])
    assert new.starts() == old.starts()
    for ratios in (None, {"online": 1, "demonstration": 2, "intervention": 1}):
        a, b = (x.sample(128, np.random.default_rng(5), ratios) for x in (old, new))
        for f in fields(a):
            if f.name not in ("episode_index", "extra"):
                np.testing.assert_array_equal(getattr(a, f.name), getattr(b, f.name), f.name)
        np.testing.assert_array_equal(
            old.sample_states(64, np.random.default_rng(1), ratios), new.sample_states(64, np.random.default_rng(1), ratios)
        )
        chunks = [b.sample_chunks(64, np.random.default_rng(1), 7, 3, ratios) for b in (old, new)]
        for x, y in zip(*chunks, strict=True):
            np.testing.assert_array_equal(x, y)


def sampled(buffer: ReplayBuffer) -> set[int]:
    if not buffer.total_starts:
        return set()
    return set(buffer.sample(500, np.random.default_rng(0)).step.tolist())


def blank(rng, length=8, **more) -> Episode:
    ep = episode(rng, "e", length, messy=False, **more)
    ep.reward[:] = np.nan
    return ep


def test_late_rewards_change_what_is_drawn():
    buffer = new_buffer(n=2)
    put(buffer, blank(np.random.default_rng(0)))
    assert sampled(buffer) == set()
    event = RewardEvent("e", 3, "vlm", 0.5, RewardKind.DENSE, event_id="B")
    assert buffer.update_reward(event)
    assert sampled(buffer) == set()
    assert buffer.update_reward(("e", 3, 0.25))
    assert sampled(buffer) == {2}
    np.testing.assert_allclose(buffer.sample(1, np.random.default_rng(0)).reward, 0.5 + 0.9 * 0.25)
    # an older event, the same one again, and an invalid one change nothing
    older = RewardEvent("e", 3, "vlm", 0.9, RewardKind.DENSE, event_id="A")
    invalid = RewardEvent("e", 3, "vlm", np.nan, RewardKind.DENSE, valid=False, reason="timeout", event_id="C")
    for late in (older, event, invalid):
        buffer.update_reward(late)
        np.testing.assert_allclose(buffer.sample(1, np.random.default_rng(0)).reward, 0.725)
    buffer.update_reward(RewardEvent("e", 3, "button", -1.0, RewardKind.PENALTY, event_id="D"))
    np.testing.assert_allclose(buffer.sample(1, np.random.default_rng(0)).reward, -0.275, atol=1e-6)
    buffer.update_reward(RewardEvent("e", 3, "vlm", np.nan, RewardKind.DENSE, valid=False, revokes="B", event_id="E"))
    np.testing.assert_allclose(buffer.sample(1, np.random.default_rng(0)).reward, 0.9 - 1 + 0.225, atol=1e-6)
    buffer.set_rewards("e", np.ones(8))
    assert sampled(buffer) == set(range(8))
    assert not buffer.update_reward(RewardEvent("unknown", 3, "vlm", 1.0))
    with pytest.raises(ValueError, match="potential"):
        buffer.update_reward(RewardEvent("e", 3, "progress", 0.5, RewardKind.POTENTIAL))
    with pytest.raises(ValueError, match="accepted are 1 to 8"):
        buffer.update_reward(RewardEvent("e", 9, "vlm", 0.5))


def test_a_verdict_on_an_episode():
    buffer = new_buffer(n=3)
    put(buffer, blank(np.random.default_rng(0), terminated=False))
    buffer.mark_success("e", True, step=6)
    assert sampled(buffer) == {0, 1, 2, 3, 4, 5}, "what came after the success is not sampled"
    batch = buffer.sample(200, np.random.default_rng(0))
    for t in range(6):
        at = int(np.flatnonzero(batch.step == t)[0])
        np.testing.assert_allclose(batch.reward[at], 0.9 ** (5 - t) if t >= 3 else 0, rtol=1e-6)
        assert (batch.discount[at] == 0) == (t >= 3)
    buffer.mark_success("e", None)
    assert sampled(buffer) == set()
    # The same through an event of the store's label source; the later word counts.
    buffer.update_reward(RewardEvent("e", 8, "label", 1.0, event_id="2"))
    assert sampled(buffer) == set(range(8))
    buffer.update_reward(RewardEvent("e", 8, "label", 0.0, event_id="3"))
    assert sampled(buffer) == set(range(6)), "a failure leaves the end truncated"
    assert buffer.sample(100, np.random.default_rng(0)).reward.sum() == 0


def test_decision_windows_are_the_policys_own():
    rng = np.random.default_rng(0)
    buffer = new_buffer(n=4, stride="decision")
    ep = episode(rng, "e", 14, messy=False)
    ep.source[5] = Source.HUMAN
    ep.decisions[2].noise = None
    put(buffer, ep)
    assert sampled(buffer) == {0, 12}
    assert buffer.sample(4, rng).is_decision.all()
    assert new_buffer(n=5, stride="decision").total_starts == 0


def test_chunks_for_cloning():
    rng = np.random.default_rng(0)
    buffer = new_buffer()
    ep = episode(rng, "e", 10, messy=False, terminated=False)
    ep.source[6] = Source.LATCHED
    given_ = put(buffer, ep)
    cond, action, mask = buffer.sample_chunks(300, rng, horizon=4, n_obs=3)
    starts = {}
    for row in range(300):
        t = int(np.flatnonzero((given_["conditioning"] == cond[row, -1]).all(1))[0])
        starts[t] = row
        np.testing.assert_array_equal(cond[row], given_["conditioning"][[max(t - 2, 0), max(t - 1, 0), t]])
        for i in range(4):
            inside = t + i < 10
            assert mask[row, i] == (inside and t + i != 6)
            np.testing.assert_array_equal(action[row, i], ep.action[t + i] if inside else np.where(DELTA, 0, ep.action[9]))
    assert starts.keys() == set(range(10)) - {6}
    states = buffer.sample_states(300, rng)
    assert states.dtype == np.float32
    assert {s.tobytes() for s in states} == {s.tobytes() for s in given_["conditioning"][:-1]}


def test_extra_arrays_and_refusals():
    rng = np.random.default_rng(0)
    buffer = new_buffer(extra={"return": FeatureSpec((2,))})
    ep = episode(rng, "e", 10, messy=False)
    values = rng.normal(size=(10, 2)).astype("f4")
    with pytest.raises(ValueError, match="extra"):
        put(buffer, ep)
    with pytest.raises(ValueError, match="return"):
        put(buffer, ep, extra={"return": values[:-1]})
    put(buffer, ep, extra={"return": values})
    batch = buffer.sample(32, rng)
    np.testing.assert_array_equal(batch.extra["return"], values[batch.step])
    with pytest.raises(ValueError, match="without action_base"):
        put(buffer, episode(rng, "f", 9), base=False, extra={"return": values[:9]})
    bad = episode(rng, "g", 9)
    with pytest.raises(ValueError, match="conditioning is not finite"):
        buffer.add(bad, np.full((10, C), np.nan), bad.action, action_base=bad.action, extra={"return": values[:9]})
    short = episode(rng, "h", 8)
    with pytest.raises(ValueError, match=r"action has shape \(9, 3\), expected \(8, 3\)"):
        buffer.add(short, np.zeros((9, C)), bad.action, action_base=short.action, extra={"return": values[:8]})
    assert buffer.episode_ids() == ["e"]
