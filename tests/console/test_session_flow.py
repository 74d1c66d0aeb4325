"""A guided session from the first check to the report: with a person, without one, interrupted, and never giving the policies away."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install 'robot_rl[console]'")
pytest.importorskip("uvicorn", reason="pip install 'robot_rl[console]'")

from console_kit import Page, connect, live

from robot_rl.console.bridge import EpisodeView, SessionView, WeightsView
from robot_rl.console.flow import FlowConfig, SessionFlow
from robot_rl.console.report import render
from robot_rl.replay.store import EpisodeStore

httpx = pytest.importorskip("httpx", reason="pip install httpx")

READY = SessionView(guard="ok", armed=True, nodes={"policy_node": "active"}, weights=WeightsView(3, 3, 0, 0.0, 4))


class Robot:
    """A session that does what the flow asks for; episodes end when told."""

    def __init__(self, flow: SessionFlow, rates: dict[str, float] | None = None) -> None:
        self.flow, self.view, self.now, self.pinned = flow, READY, 0.0, -1
        self.ready = {0, 3}  # versions that can act
        self.rates, self.rng = rates or {"old": 0.5, "new": 0.9}, np.random.default_rng(0)
        self.asked: list[tuple] = []
        self.count = 0

    def look(self, seconds: float = 0.2, seated: bool = True) -> list[str]:
        self.now += seconds
        names = []
        for request in self.flow.look(self.view, self.now, seated):
            names.append(request.name)
            self.asked.append((request.name, *request.values.values()))
            if request.name == "act_with":
                if request.values["version"] not in {*self.ready, -1}:
                    self.flow.refused(f"version {request.values['version']} is not ready here")
                    break
                self.pinned = request.values["version"]
            if request.name == "start_episode":
                self.count += 1
                weights = self.view.weights
                acting = weights.promoted if self.pinned < 0 else self.pinned
                episode = EpisodeView(f"episode-{self.count}", "running", self.count)
                self.view = replace(self.view, episode=episode, weights=replace(weights, acting=acting))
        return names

    def play(self, outcome: str = "", state: str = "committed", **ended) -> None:
        """From the prompt to the episode's end."""
        if self.flow.stage == "prompt" and not self.flow.config.hands_off:
            self.flow.ready(self.now, self.view, True)
        for _ in range(60):
            self.look()
            if self.flow.stage == "running":
                break
        assert self.flow.stage == "running", (self.flow.stage, self.flow.problem)
        rate = self.rates["old" if self.pinned == 0 else "new"]
        outcome = outcome or ("success" if self.rng.random() < rate else "failure")
        self.view = replace(self.view, episode=replace(self.view.episode, state=state, outcome=outcome, **ended))
        self.look()


def begun(folder, **config) -> tuple[SessionFlow, Robot]:
    flow = SessionFlow(
        FlowConfig(**{"baseline_episodes": 3, "comparison_episodes": 4, "reset_s": 1.0, "seed": 1, **config}), folder
    )
    robot = Robot(flow)
    flow.tested = True
    robot.look()
    flow.ready(robot.now, robot.view, True)
    return flow, robot


def test_checks_stand_before_everything(tmp_path):
    flow = SessionFlow(FlowConfig(), tmp_path)
    robot = Robot(flow)
    robot.view = replace(
        READY, nodes={"policy_node": "inactive"}, armed=False, guard_reason="start", problems=("front is stale",)
    )
    assert robot.look() == []
    with pytest.raises(
        ValueError, match=r"Processes: waiting for policy_node.*front is stale.*not armed.*take the controls.*hold the drive"
    ):
        flow.ready(0.0, robot.view, False)
    assert flow.kept.phase == "preflight"
    assert [c["ok"] for c in flow.view(0.0)["checks"]].count(False) == 5


def test_a_whole_session(tmp_path):
    flow, robot = begun(tmp_path)
    assert flow.kept.phase == "baseline"
    for _ in range(3):
        robot.play()
    assert ("act_with", 0) in robot.asked
    assert ("explore", False) in robot.asked
    assert ("pause_learning", True) in robot.asked
    assert flow.kept.phase == "training"
    robot.asked.clear()
    robot.play()
    robot.play()
    assert {("act_with", -1), ("explore", True), ("pause_learning", False)} <= set(robot.asked)
    flow.next_phase(robot.now, robot.view)
    assert flow.blinded
    robot.asked.clear()
    arms = []
    while flow.blinded:
        arms.append(flow.blind.arm)
        robot.play()
        assert robot.pinned == (0 if arms[-1] == "old" else 3), "the arm that is due acts"
    assert ("explore", False) in robot.asked
    assert sorted(arms) == ["new"] * 4 + ["old"] * 4
    assert tuple(arms) == flow.blind.order
    assert flow.done
    result = flow.result()
    assert result["comparison"]["old"]["n"] == result["comparison"]["new"]["n"] == 4
    assert result["baseline"]["n"] == 3
    assert result["version"] == 3
    robot.look()
    assert robot.asked[-3:] == [("pause_learning", True), ("explore", True), ("act_with", -1)]


def test_nothing_moves_without_a_person_at_the_controls(tmp_path):
    flow, robot = begun(tmp_path)
    assert robot.look(30.0) != ["start_episode"]
    assert flow.stage == "prompt"
    flow.ready(robot.now, robot.view, True)
    assert flow.stage == "countdown"
    assert "start_episode" not in robot.look(0.5, seated=False)
    assert (flow.stage, flow.problem) == ("prompt", "nobody is at the controls")
    flow.ready(robot.now, robot.view, True)
    robot.view = replace(robot.view, armed=False, guard_reason="silence")
    assert "start_episode" not in robot.look(2.0)
    assert "not armed (silence)" in flow.problem
    with pytest.raises(ValueError, match="only training"):
        flow.next_phase(robot.now, robot.view)


def test_episodes_without_a_verdict_wait_for_one(tmp_path):
    flow, robot = begun(tmp_path)
    robot.play("none")
    assert flow.stage == "label"
    robot.look(100.0)
    assert flow.stage == "label"
    flow.labelled("another-episode", True)
    assert flow.stage == "label"
    flow.labelled("episode-1", True)
    assert flow.kept.baseline == [True]
    flow.undone()
    assert flow.kept.baseline == []
    robot.play("success")
    robot.play("none")
    flow.discarded("episode-3")
    assert flow.kept.baseline == [True]
    robot.play("none", state="aborted")
    assert flow.kept.baseline == [True]
    assert flow.stage == "prompt"


def test_a_version_that_changed_under_the_comparison_does_not_count(tmp_path):
    flow, robot = begun(tmp_path, baseline_episodes=0)
    robot.play()
    flow.next_phase(robot.now, robot.view)
    while flow.blind.arm != "new":
        robot.play()
    played = flow.blind.played
    flow.ready(robot.now, robot.view, True)
    robot.look(2.0)
    robot.look()
    assert robot.view.weights.acting == 3
    robot.view = replace(robot.view, weights=replace(robot.view.weights, acting=4))
    robot.look()
    robot.view = replace(robot.view, episode=replace(robot.view.episode, state="committed", outcome="success"))
    robot.look()
    assert flow.blind.played == played
    assert flow.blind.discarded == 1
    assert "another version" in flow.problem


def test_a_learner_that_goes_on_publishing_does_not_touch_the_comparison(tmp_path):
    """What is compared is what was promoted when training ended, however many versions are promoted beside it."""
    flow, robot = begun(tmp_path, baseline_episodes=0)
    robot.play()
    flow.next_phase(robot.now, robot.view)
    promoted = 3
    while flow.blinded:
        promoted += 1
        robot.view = replace(robot.view, weights=replace(robot.view.weights, promoted=promoted, newest=promoted))
        robot.ready.add(promoted)
        robot.play()
    assert flow.result()["version"] == 3
    assert flow.result()["comparison"]["discarded"] == 0
    assert robot.count == 1 + 8


def test_a_version_that_cannot_be_had_ends_the_comparison_in_bounded_time(tmp_path):
    """Without a person it ends by itself and says why; whoever is due, the refusal is the same, so it gives nobody away."""
    flow, robot = begun(tmp_path, baseline_episodes=0, training_episodes=1, hands_off=True, reset_s=0.0)
    robot.play("success")
    assert flow.blinded
    robot.play()
    robot.ready = {0}
    began, said = robot.now, set()
    while flow.blinded:
        robot.look()
        said.add(flow.problem)
        assert robot.now - began < 120.0, "it goes on for ever"
    assert said - {""} == {"version 3 is not ready here"}
    assert robot.count == 2, "no episode was played by anything else"
    assert flow.done
    assert flow.result()["given_up"].startswith("blind comparison given up after 1 of 8 episodes")
    assert "version 3 is not ready here" in flow.result()["given_up"]
    assert "comparison" not in flow.result()
    assert "Blind comparison given up after 1 of 8" in render(flow.result(), [], [], "a run")
    assert SessionFlow(flow.config, tmp_path).kept.phase == "preflight"


def test_without_a_person_an_episode_without_a_verdict_is_played_again(tmp_path):
    """A verdict may come a little after the end; where none comes, nobody is there to be waited for."""
    flow, robot = begun(tmp_path, baseline_episodes=2, hands_off=True, reset_s=0.0)
    robot.play("none", state="ended")
    assert flow.stage == "label"
    robot.look(5.0)
    robot.view = replace(robot.view, episode=replace(robot.view.episode, state="committed", outcome="success"))
    robot.look()
    assert flow.kept.baseline == [True], "it came late"
    robot.play("none")
    robot.look(11.0)
    assert "nobody said" in flow.problem
    robot.play("failure")
    assert flow.kept.baseline == [True, False]
    assert flow.kept.phase == "training"


def test_a_person_may_end_a_comparison_that_cannot_go_on_or_put_it_right(tmp_path):
    flow, robot = begun(tmp_path, baseline_episodes=0)
    robot.play()
    flow.next_phase(robot.now, robot.view)
    robot.ready = {0}
    for _ in range(5):
        with pytest.raises(ValueError, match="only training"):
            flow.next_phase(robot.now, robot.view)
        flow.ready(robot.now, robot.view, True)
        robot.look(16.0)
        assert (flow.stage, flow.problem) == ("prompt", "version 3 is not ready here")
    assert flow.view(robot.now)["hopeless"]
    robot.ready = {0, 3}
    robot.play()
    assert flow.blind.played == 1
    assert not flow.view(robot.now)["hopeless"], "it was put right"
    robot.ready = {0}
    for _ in range(5):
        flow.ready(robot.now, robot.view, True)
        robot.look(16.0)
    flow.next_phase(robot.now, robot.view)
    assert flow.done
    assert "comparison" not in flow.result()


def test_without_a_promoted_version_there_is_nothing_to_compare(tmp_path):
    flow, robot = begun(tmp_path, baseline_episodes=0, training_episodes=1)
    robot.view = replace(robot.view, weights=WeightsView())
    robot.play("success")
    assert flow.kept.phase == "training"
    assert "nothing to compare" in flow.problem


def test_training_ends_when_a_person_hardly_drives_any_more(tmp_path):
    """With 20 steps an episode and a window of 50: three episodes fill it, and the last drop counts."""
    flow, robot = begun(tmp_path, baseline_episodes=0, intervention_rate=0.1, intervention_steps=50)

    def play(human_steps: int) -> None:
        robot.play("success", step=20, human_steps=human_steps)

    play(0)
    play(0)
    assert flow.driven is None
    play(12)
    assert flow.view(robot.now)["driven"] == 12 / 60
    play(0)
    play(0)
    assert flow.kept.phase == "training"
    flow.undone()
    assert len(flow.kept.driven) == len(flow.kept.training) == 4
    again = SessionFlow(flow.config, tmp_path)
    assert again.driven == flow.driven == 12 / 60
    play(0)
    play(3)
    assert flow.kept.phase == "comparison"
    assert flow.result()["training"]["driven"] == 3 / 60
    assert "a person drove 5.0" in render(flow.result(), [], [], "a run")


def test_a_session_goes_on_where_it_was(tmp_path):
    flow, robot = begun(tmp_path, baseline_episodes=0)
    robot.play("success")
    flow.next_phase(robot.now, robot.view)
    for _ in range(3):
        robot.play()
    again = SessionFlow(flow.config, tmp_path)
    assert again.blinded
    assert again.blind == flow.blind
    assert again.kept == flow.kept
    second = Robot(again)
    second.count = 100
    while again.blinded:
        second.play()
    assert again.blind.order == flow.blind.order
    assert json.loads((tmp_path / "session.json").read_text())["phase"] == "report"
    assert SessionFlow(flow.config, tmp_path).kept.phase == "preflight", "a finished session is followed by the next one"
    assert len(list(tmp_path.glob("session-*.json"))) == 1


def test_a_live_session_hides_who_acts_until_the_end(tmp_path):
    """Nothing that a page can read or is told differs between the policies while they are compared."""
    config = FlowConfig(baseline_episodes=1, training_episodes=1, comparison_episodes=2, reset_s=0.0, hands_off=True)
    leaks: list[str] = []
    shown: list[dict] = []

    async def work(console):
        async with connect(console.url) as socket, httpx.AsyncClient(base_url=console.url) as http:
            page = Page(socket)
            await page.until(lambda s: s["flow"]["phase"] != "preflight", "the session begins")
            assert (await page.ask("take_seat", operator="ann"))["ok"]
            for name, text in (("promote", "baseline"), ("start_episode", "press Ready")):
                answer = await page.ask(name)
                if page.state["flow"]["phase"] == "baseline":
                    assert not answer["ok"]
                    assert text in answer["text"]
            await page.until(lambda s: s["flow"]["phase"] == "training", "training")
            await page.ask("promote")
            await page.until(lambda s: s["weights"]["promoted"] == 1 or s["blind"], "the new version is promoted")
            await page.until(lambda s: s["blind"], "the comparison", 60.0)
            while page.state["blind"]:
                shown.append({k: page.state[k] for k in ("weights", "learner", "successes", "line")})
                answers = {n: (await http.get(p)).json() for n, p in (("rows", "/api/episodes"), ("curve", "/api/curve"))}
                if not page.state["blind"]:
                    break
                await page.hear(0.02)
                if page.state["blind"]:
                    leaks.extend(str(r) for r in answers["rows"] if r["version"] != -1)
                    leaks.extend(str(p) for p in answers["curve"]["points"])
                    told = json.dumps(page.state["flow"])
                    leaks.extend(w for w in ('"old"', '"new"', "order", "salt") if w in told.replace("old policy", ""))
                    if (await http.get("/report")).status_code != 404:  # then the last episode has ended since
                        await page.until(lambda s: not s["blind"], "the end of the comparison")
                        break
                    answer = await page.ask("rollback")
                    assert not answer["ok"] or not page.state["blind"]
                await page.hear(0.2)
            state = await page.until(lambda s: s["flow"]["phase"] == "report", "the report")
            for _ in range(50):
                report = await http.get("/report")
                if report.status_code == 200:
                    break
                await asyncio.sleep(0.1)
            return state, report.text

    with live(tmp_path, skills=(0.0, 1.0), steps=30, rate_hz=40.0, flow=config, speed=0.02, cameras=()) as console:
        state, report = asyncio.run(asyncio.wait_for(work(console), 90.0))
        flow = console.office.flow
    assert leaks == []
    assert len({json.dumps(s) for s in shown}) == 1, "the state is the same whoever acts"
    compared = state["flow"]["result"]["comparison"]
    assert compared["new"]["successes"] == 2
    assert compared["old"]["successes"] == 0
    assert f"SHA-256 <code>{flow.blind.commitment[:16]}" in report
    assert compared["verdict"] in report
    with EpisodeStore.open(tmp_path / "store") as store:
        versions = [store.meta(i).weights_version for i in store.episode_ids()][-4:]
    assert versions == [0 if a == "old" else 1 for a in flow.blind.order], "what acted is what was drawn"
