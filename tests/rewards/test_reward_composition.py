"""Rewards from many sources: which event counts, which transition it changes, and when nothing is known."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_rl.replay import ReplayBuffer, WindowConfig
from robot_rl.replay.reward_log import LABEL_SOURCE, RewardTable
from robot_rl.replay.ulid import new_ulid
from robot_rl.rewards.composer import RewardComposer
from robot_rl.rewards.composition import Channels, channels_of, chunk_reward, compose
from robot_rl.rewards.composition_config import LABEL, ChannelConfig, CompositionConfig
from robot_rl.rewards.gate import UncalibratedReward, admit
from robot_rl.types import Episode, EpisodeMeta, RewardEvent, RewardKind, Stratum

LENGTH, GAMMA = 12, 0.9
CHANNELS = (
    ChannelConfig("clf", RewardKind.SUCCESS, 1.0),
    ChannelConfig("progress", RewardKind.POTENTIAL, 0.5),
    ChannelConfig("push", RewardKind.DENSE, 0.1, scale=2.0, shift=-1.0, missing="zero"),
    ChannelConfig("grip", RewardKind.PENALTY, 1.0),
)


def event(source: str, step: int, value: float, kind: RewardKind, **more) -> RewardEvent:
    return RewardEvent("e", step, source, value, kind, event_id=more.pop("event_id", new_ulid()), **more)


def closed(source: str, step: int) -> RewardEvent:
    return event(f"{source}.closed", step, float("nan"), RewardKind.SUCCESS, valid=False, reason="closed")


def episode(name: str = "e", length: int = LENGTH, terminated: bool = False) -> Episode:
    rng = np.random.default_rng(0)
    done = np.zeros(length, bool)
    done[-1] = terminated
    return Episode.from_arrays(
        EpisodeMeta(name, stratum=Stratum.ONLINE), {"observation.state": rng.normal(size=(length + 1, 2)).astype(np.float32)},
        rng.uniform(-1, 1, (length, 2)).astype(np.float32), terminated=done, truncated=~done & (np.arange(length) == length - 1),
    )  # fmt: skip


def buffer(n: int = 3) -> ReplayBuffer:
    return ReplayBuffer(1000, conditioning_dim=2, action_dim=2, window=WindowConfig(n, GAMMA, "any"), delta_mask=[False, False])


def filled(config: CompositionConfig, n: int = 3, **more) -> tuple[RewardComposer, ReplayBuffer]:
    held = buffer(n)
    composer = RewardComposer(config, held, GAMMA)
    e = episode(**more)
    held.add(e, e.observations["observation.state"], e.action)
    composer.begin(e)
    return composer, held


def content(held: ReplayBuffer) -> tuple[np.ndarray, ...]:
    """Everything that sampling depends on."""
    drawn = held.sample(200, np.random.default_rng(1)) if held.total_starts else None
    parts = (held.total_starts, *((drawn.reward, drawn.discount, drawn.step, drawn.mask, drawn.action) if drawn else ()))
    return tuple(np.asarray(p) for p in parts)


def some_events(seed: int) -> list[RewardEvent]:
    rng = np.random.default_rng(seed)
    events = []
    for k in range(LENGTH + 1):
        events.append(event("progress", k, float(rng.random()), RewardKind.POTENTIAL, model_id="m"))
        if k and rng.random() < 0.6:
            events.append(event("push", k, float(rng.normal()), RewardKind.DENSE))
        if k and rng.random() < 0.3:
            events.append(event("grip", k, -0.05, RewardKind.PENALTY))
        if k and rng.random() < 0.3:  # a newer word on the same step, and one that is taken back
            late = event("push", k, float(rng.normal()), RewardKind.DENSE)
            events += [
                late,
                event("push", k, float("nan"), RewardKind.DENSE, valid=False, reason="error", revokes=late.event_id),
            ]
    if rng.random() < 0.7:
        events.append(event("clf", int(rng.integers(1, LENGTH + 1)), 1.0, RewardKind.SUCCESS))
    events.append(closed("clf", LENGTH))
    events.append(closed("grip", LENGTH))
    return events


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), order=st.randoms(use_true_random=False))
def test_late_events_out_of_order_and_twice_leave_the_same_replay_content(seed, order):
    config = CompositionConfig(CHANNELS)
    events = some_events(seed)
    composer, in_time = filled(config)
    for e in events:
        composer.add(e)
    # The others come before the episode does, after it, twice, and in any order.
    mixed = events + order.sample(events, len(events) // 2)
    order.shuffle(mixed)
    held = buffer()
    late = RewardComposer(config, held, GAMMA)
    early = order.randint(0, len(mixed))
    for e in mixed[:early]:
        late.add(e)
    recorded = episode()
    held.add(recorded, recorded.observations["observation.state"], recorded.action)
    late.begin(recorded)
    for e in mixed[early:]:
        late.add(e)
    for a, b in zip(content(in_time), content(held), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_event_changes_the_transition_that_reached_it_and_a_potential_two():
    config = CompositionConfig(
        (ChannelConfig("push", RewardKind.DENSE, missing="zero"), ChannelConfig("progress", RewardKind.POTENTIAL))
    )
    composer, _ = filled(config)
    assert not composer.apply("e").reward.any()
    composer.add(event("push", 5, 1.0, RewardKind.DENSE))
    assert np.flatnonzero(composer.apply("e").reward).tolist() == [4]
    for k in range(LENGTH + 1):
        composer.add(event("progress", k, 0.0, RewardKind.POTENTIAL))
    composer.add(event("progress", 8, 1.0, RewardKind.POTENTIAL))
    np.testing.assert_allclose(composer.apply("e").reward[[7, 8]], [GAMMA, -1.0], rtol=1e-6)


def test_an_invalid_answer_changes_nothing():
    composer, _ = filled(CompositionConfig((ChannelConfig("push", RewardKind.DENSE),)))
    composer.add(event("push", 3, 2.0, RewardKind.DENSE))
    before = composer.apply("e").reward.copy()
    composer.add(event("push", 3, float("nan"), RewardKind.DENSE, valid=False, reason="timeout"))
    np.testing.assert_array_equal(before, composer.apply("e").reward)


def test_what_is_unknown_is_not_sampled_until_it_is_known():
    composer, held = filled(CompositionConfig((ChannelConfig("clf", RewardKind.SUCCESS),)), n=1)
    assert held.total_starts == 0
    assert not composer.valid.enough
    composer.add(closed("clf", LENGTH))
    assert held.total_starts == LENGTH
    assert composer.valid.enough
    assert not held.sample(50, np.random.default_rng(0)).reward.any(), "nothing happened: that is a zero, and known"
    composer.add(event("clf", 7, 1.0, RewardKind.SUCCESS))
    assert held.total_starts == 7, "what came after the success is not learned from"
    drawn = held.sample(200, np.random.default_rng(0))
    last = drawn.step == 6
    assert last.any()
    assert (drawn.reward[last] == 1.0).all()
    assert (drawn.discount[last] == 0.0).all(), "and the success ends the MDP"


def test_two_models_potentials_make_no_pair():
    channel = ChannelConfig("progress", RewardKind.POTENTIAL, missing="mask")
    events = [event("progress", k, 0.1 * k, RewardKind.POTENTIAL, model_id="a" if k < 4 else "b") for k in range(LENGTH + 1)]
    composed = compose(channels_of(LENGTH, events, [channel]), CompositionConfig((channel,)), GAMMA, False)
    assert np.flatnonzero(np.isnan(composed.reward)).tolist() == [3]


@pytest.mark.parametrize("terminated", [False, True])
@pytest.mark.parametrize("terminal", ["zero", "keep"])
def test_shaping_of_a_chunk_is_the_sum_of_its_steps_and_needs_only_its_ends(terminated, terminal):
    channel = ChannelConfig("progress", RewardKind.POTENTIAL, missing="mask")
    config = CompositionConfig((channel, ChannelConfig("push", RewardKind.DENSE, missing="zero")), terminal_phi=terminal)
    rng = np.random.default_rng(0)
    length = 24
    events = [event("progress", k, float(rng.random()), RewardKind.POTENTIAL) for k in range(length + 1)]
    events += [event("push", k, float(rng.normal()), RewardKind.DENSE) for k in range(1, length + 1)]
    channels = channels_of(length, events, config.channels)
    steps = compose(channels, config, GAMMA, terminated).reward
    for h in range(1, 17):
        for t in range(length - h + 1):
            wanted = sum(GAMMA**i * float(steps[t + i]) for i in range(h))
            assert chunk_reward(channels, config, GAMMA, terminated, t, h) == pytest.approx(wanted, abs=1e-6)
            inside = Channels(channels.value.copy(), channels.model, channels.closed)
            inside.value[t + 1 : t + h, 0] = np.nan
            assert chunk_reward(inside, config, GAMMA, terminated, t, h) == pytest.approx(wanted, abs=1e-6)


def best_actions(reward: np.ndarray, nxt: np.ndarray, terminal: np.ndarray, gamma: float) -> np.ndarray:
    """(S, A) optimal action values of a small deterministic MDP."""
    q = np.zeros_like(reward)
    for _ in range(400):
        v = np.where(terminal, 0.0, q.max(1))
        q = reward + gamma * v[nxt]
    return q


def test_shaping_with_any_potential_leaves_the_best_policy_alone_and_keeping_it_at_the_end_does_not():
    rng = np.random.default_rng(0)
    states, actions, changed = 8, 3, 0
    for _ in range(100):
        nxt = rng.integers(0, states, (states, actions))
        terminal = np.zeros(states, bool)
        terminal[-1] = True
        reward = rng.normal(size=(states, actions))
        phi = rng.random(states) * 5
        plain = best_actions(reward, nxt, terminal, GAMMA)

        def composed(keep: str, phi=phi, nxt=nxt, terminal=terminal, reward=reward) -> np.ndarray:
            channels = (ChannelConfig("p", RewardKind.POTENTIAL), ChannelConfig("r", RewardKind.DENSE))
            config = CompositionConfig(channels, terminal_phi=keep)
            out = np.zeros_like(reward)
            for s in range(states):
                for a in range(actions):
                    matrix = Channels(
                        np.array([[phi[s], np.nan], [phi[nxt[s, a]], reward[s, a]]]), np.zeros((2, 2), np.int64), np.full(2, -1)
                    )
                    out[s, a] = compose(matrix, config, GAMMA, bool(terminal[nxt[s, a]])).reward[0]
            return out

        kept_out = slice(0, states - 1)
        shaped = best_actions(composed("zero").astype(float), nxt, terminal, GAMMA)
        np.testing.assert_allclose(shaped[kept_out] + phi[kept_out, None], plain[kept_out], atol=1e-4)
        moved = best_actions(composed("keep").astype(float), nxt, terminal, GAMMA)
        changed += bool((moved[kept_out].argmax(1) != plain[kept_out].argmax(1)).any())
    assert changed > 0, "keeping the potential at a terminal state can change what is best"


def test_silence_of_a_source_is_nothing_only_when_it_is_done():
    channel = ChannelConfig("grip", RewardKind.PENALTY, missing="mask")
    config = CompositionConfig((channel,))
    partly = channels_of(LENGTH, [closed("grip", 4)], [channel])
    assert np.isfinite(compose(partly, config, GAMMA, False).reward).tolist() == [True] * 4 + [False] * (LENGTH - 4)


def test_orphans_wait_for_a_while_and_are_counted():
    now = [0.0]
    composer = RewardComposer(CompositionConfig(CHANNELS), buffer(), GAMMA, clock=lambda: now[0])
    composer.add(dataclasses.replace(event("push", 1, 1.0, RewardKind.DENSE), episode_id="gone"))
    now[0] = 601.0
    composer.add(dataclasses.replace(event("push", 1, 1.0, RewardKind.DENSE), episode_id="other"))
    assert composer.counts.orphans == 1


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"reward\.gamma=0\.5"):
        RewardComposer(CompositionConfig(CHANNELS), buffer(), 0.5)
    with pytest.raises(ValueError, match="twice"):
        CompositionConfig((ChannelConfig("a"), ChannelConfig("a")))
    with pytest.raises(ValueError, match="missing='neutral'"):
        ChannelConfig("a", RewardKind.DENSE, missing="neutral")
    with pytest.raises(ValueError, match="terminal_phi"):
        CompositionConfig(terminal_phi="maybe")


def test_a_learner_refuses_a_source_without_a_report_that_speaks_for_it(tmp_path):
    config = CompositionConfig((ChannelConfig("env"), ChannelConfig("clf"), ChannelConfig("seen", weight=0.0)))
    with pytest.raises(UncalibratedReward, match="clf: it has no report"):
        admit(config)
    path = tmp_path / "clf.json"
    path.write_text(json.dumps({"source": "clf", "model_id": "m@1", "findings": ["auc 0.6 is below 0.8"]}))
    named = CompositionConfig((ChannelConfig("clf", report=str(path)),))
    with pytest.raises(UncalibratedReward, match=r"auc 0\.6"):
        admit(named)
    assert admit(dataclasses.replace(named, accept_uncalibrated=True)).channels[0].model_id == "m@1"
    path.write_text(json.dumps({"source": "clf", "model_id": "m@1", "findings": []}))
    assert admit(named).channels[0].model_id == "m@1"
    with pytest.raises(UncalibratedReward, match="names m@2"):
        admit(CompositionConfig((ChannelConfig("clf", report=str(path), model_id="m@2"),)))
    bound = channels_of(3, [event("clf", 2, 1.0, RewardKind.SUCCESS, model_id="m@2")], admit(named).channels)
    assert not np.isfinite(bound.value).any(), "another model's word does not count"


def test_a_verdict_speaks_for_success_channels_that_said_nothing():
    composer, held = filled(CompositionConfig((ChannelConfig("clf"),)), n=1)
    assert LABEL == LABEL_SOURCE
    composer.add(event(LABEL, 9, 1.0, RewardKind.SUCCESS))
    assert held.total_starts == 9
    composer.add(event("clf", 5, 1.0, RewardKind.SUCCESS))
    assert held.total_starts == 5, "what it says itself counts"


def test_recorded_rewards_are_a_channel_too():
    composer, held = filled(CompositionConfig((ChannelConfig("recorded", RewardKind.DENSE, 2.0),)), n=1)
    assert held.total_starts == 0, "this episode was recorded without rewards"
    e = episode("f")
    e.reward[:] = 1.5
    held.add(e, e.observations["observation.state"], e.action)
    composer.begin(e)
    assert (held.sample(20, np.random.default_rng(0)).reward == 3.0).all()


def test_newest_word_wins_whatever_order():
    a, b = event("push", 2, 1.0, RewardKind.DENSE), event("push", 2, 5.0, RewardKind.DENSE)
    for first, second in ((a, b), (b, a)):
        table = RewardTable()
        table.add(first)
        table.add(second)
        assert channels_of(4, table.active("e"), CHANNELS).value[2, 2] == 5.0
