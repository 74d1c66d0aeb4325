"""Configuration: files, overrides, and every mistake said at once."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_rl import config as cfg
from robot_rl.config.decoding import decode_value
from robot_rl.config.schema import members_of
from robot_rl.config.text import Text


class Mode(str, Enum):
    NA = "dsrl-na"
    SAC = "dsrl-sac"


@dataclass(frozen=True)
class LatentHead:
    kind: Literal["latent"] = "latent"
    action_bound: float = cfg.option(1.5, help="largest noise", gt=0)


@dataclass(frozen=True)
class ResidualHead:
    scale: float = 0.1
    kind: Literal["residual"] = "residual"


@dataclass(frozen=True)
class Train:
    utd: int = cfg.option(1, help="updates for each environment step", ge=1)
    lr: float = 3e-4
    mode: Mode = Mode.NA
    device: Literal["cpu", "cuda", "auto"] = "auto"
    betas: tuple[float, float] = (0.9, 0.999)
    hidden: list[int] = cfg.option([256, 256], ge=1)
    clip: float | tuple[float, float] | None = None
    amp: bool = False

    def __post_init__(self) -> None:
        if self.utd > 100 and self.lr > 1e-3:
            raise ValueError("utd above 100 needs lr of at most 1e-3")


@dataclass(frozen=True)
class Run:
    task: str
    seed: int = 0
    train: Train = field(default_factory=lambda: Train(utd=7))
    head: LatentHead | ResidualHead = LatentHead()
    weights: dict[str, float] = cfg.option({"online": 0.5, "demo": 0.5}, ge=0)
    cameras: dict[str, Train] = cfg.option({})
    out: Path = cfg.option(Path("runs"), hash=False)
    note: str | None = cfg.option(None, hash=False)
    demos: int | None = None
    anything: Any = None


@dataclass
class Local:
    value: int = 1


def test_yaml_and_overrides_build_the_dataclass(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("task: lift\ntrain: {lr: 1e-3, betas: [0.8, 0.9], hidden: [64]}\nout: a/b\n")
    overrides = ["--train.utd=4", "--seed", "-3", "train.mode=dsrl-sac", "--train.amp", "--train.clip=[-1, 1]", "--note=12"]
    run = cfg.load(Run, file, overrides)
    assert run.train == Train(utd=4, lr=1e-3, mode=Mode.SAC, betas=(0.8, 0.9), hidden=[64], clip=(-1.0, 1.0), amp=True)
    assert (run.seed, run.out, run.note) == (-3, Path("a/b"), "12")
    assert cfg.load(Run, None, ["--task=x"]).train.utd == 7, "a nested default instance keeps its own values"
    assert cfg.load(Run, file, ["--seed=1"]).train.utd == 7, "also where the file sets a sibling"


def test_every_mistake_is_reported_at_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "train: {utdd: 4, lr: fast, device: gpu, betas: [0.1], hidden: [64, 0], clip: x}\nsed: 1\nweights: {a: -1}\n"
    )
    with pytest.raises(cfg.ConfigError) as refused:
        cfg.load(Run, file, ["--train.mode=dsrl-nb", "--train.amp=maybe", "--seed"])
    found = {f.key: f for f in refused.value.findings}
    assert set(found) == {
        "train.utdd", "train.lr", "train.device", "train.betas", "train.hidden.1", "train.clip", "train.mode", "train.amp",
        "sed", "seed", "weights.a", "task",
    }  # fmt: skip
    text = str(refused.value)
    assert text.startswith("12 problems in ")
    assert "train.utdd = 4: no such key; did you mean train.utd?" in text
    assert 'train.device = "gpu": accepted is one of cpu, cuda, auto' in text
    assert "train.mode = dsrl-nb: accepted is one of dsrl-na, dsrl-sac; did you mean dsrl-na?" in text
    assert "train.hidden.1 = 0: accepted is an integer >= 1" in text
    assert "task: a value is needed: text" in text
    assert "a list of 2 (a number, a number); 1 values were given" in text
    assert "train.clip" in text
    assert "a number or a list of 2 (a number, a number) or null" in text


def test_post_init_errors_carry_their_path():
    with pytest.raises(cfg.ConfigError, match=r"cameras\.front: utd above 100"):
        cfg.load(Run, None, ["--task=x", "--cameras.front.utd=200", "--cameras.front.lr=1"])


@pytest.mark.parametrize(
    ("tp", "value", "expected"),
    [
        (int, 3.0, 3), (int, "1e6", 1_000_000), (int, 2.5, None), (int, True, None), (float, 1, 1.0), (float, "1e-3", 1e-3),
        (float, ".inf", math.inf), (bool, 1, None), (bool, "yes", None), (str, 1, None), (float | None, None, None),
        (int | float, 3, 3), (int | float, 3.5, 3.5), (int | str, "3", 3), (str | None, "null", None),
    ],
)  # fmt: skip
def test_scalars(tp, value, expected):
    found: list[cfg.Finding] = []
    given = value if not isinstance(value, str) else Text(value)
    result = decode_value(tp, given, "k", found, MISSING)
    if expected is None and type(None) not in members_of(tp):
        assert len(found) == 1
    else:
        assert not found
        assert result == expected
        assert type(result) is type(expected)


def test_yaml_12_scalars_and_duplicate_keys(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("task: on\nanything: [no, 1_000, 1e-3, 0x10, 12:30, 2024-01-01, ~]\n")
    run = cfg.load(Run, file)
    assert run.task == "on"
    assert run.anything == ["no", 1000, 1e-3, "0x10", "12:30", "2024-01-01", None]
    file.write_text("task: a\nseed: 1\nseed: 2\n")
    with pytest.raises(cfg.ConfigError, match="key 'seed' is given twice"):
        cfg.load(Run, file)


def test_union_of_dataclasses_is_told_apart_by_its_literal(tmp_path):
    assert cfg.load(Run, None, ["--task=x", "--head.kind=residual", "--head.scale=0.2"]).head == ResidualHead(0.2)
    assert cfg.load(Run, None, ["--task=x", "--head.action_bound=2"]).head == LatentHead(action_bound=2.0)
    with pytest.raises(
        cfg.ConfigError, match=r"head\.kind = residul: accepted are 'latent', 'residual'; did you mean residual"
    ):
        cfg.load(Run, None, ["--task=x", "--head.kind=residul"])
    file = tmp_path / "run.yaml"
    file.write_text("task: x\nhead: {kind: latent, action_bound: 2.0}\n")
    assert cfg.load(Run, file, ["--head.kind=residual"]).head == ResidualHead(), "the old member's keys go"
    assert cfg.load(Run, file, ["--head.action_bound=3"]).head == LatentHead(action_bound=3.0)


def test_extends(tmp_path):
    (tmp_path / "base.yaml").write_text("task: a\ntrain: {utd: 2, hidden: [1, 2, 3]}\nweights: {x: 1.0}\n")
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("extends: ../base.yaml\ntrain: {lr: 0.1, hidden: [9]}\nweights: {y: 2.0}\n")
    run = cfg.load(Run, child, ["--train.hidden.0=8", "--weights.x=3"])
    assert (run.task, run.train.utd, run.train.lr, run.train.hidden) == ("a", 2, 0.1, [8])
    assert run.weights == {"x": 3.0, "y": 2.0}
    assert cfg.load(Run, None, ["--task=x", "--weights.demo=0.1"]).weights == {"online": 0.5, "demo": 0.1}
    (tmp_path / "base.yaml").write_text("extends: sub/child.yaml\n")
    with pytest.raises(cfg.ConfigError, match="without a circle"):
        cfg.load(Run, child)


def test_hash_ignores_order_and_unhashed_keys(tmp_path):
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text("task: a\nseed: 1\nweights: {a: 1, b: 2}\n")
    two.write_text("weights: {b: 2.0, a: 1.0}\nseed: 1\ntask: a\nout: elsewhere\nnote: hello\n")
    first = cfg.config_hash(cfg.load(Run, one))
    assert first == cfg.config_hash(cfg.load(Run, two))
    assert len(first) == 12
    assert int(first, 16) >= 0
    assert first != cfg.config_hash(cfg.load(Run, one, ["--train.utd=8"]))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(-(2**40), 2**40),
    lr=st.floats(allow_nan=False),
    task=st.text(max_size=20),
    clip=st.none() | st.floats(allow_nan=False) | st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    mode=st.sampled_from(Mode),
    weights=st.dictionaries(st.text(max_size=5), st.floats(0, 1e300)),
    head=st.just(LatentHead()) | st.builds(ResidualHead, scale=st.floats(-1, 1)),
)
def test_yaml_round_trip(tmp_path_factory, seed, lr, task, clip, mode, weights, head):
    run = Run(task, seed, Train(lr=lr, clip=clip, mode=mode), head, weights)
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(cfg.to_yaml(run), encoding="utf-8")
    back = cfg.load(Run, file)
    assert back == run
    assert cfg.config_hash(back) == cfg.config_hash(run)
    assert cfg.decode(Run, cfg.to_dict(run)) == run


def test_help_lists_every_key():
    text = cfg.help_text(Run)
    assert "--task  text  [required]" in text
    assert "--train.utd  an integer >= 1  [7]" in text
    assert "updates for each environment step" in text
    assert "--head.action_bound" in text
    assert "--head.scale" in text


def test_overrides_syntax_errors():
    with pytest.raises(cfg.ConfigError, match=r"an override is --key\.path=value"):
        cfg.load(Run, None, ["--task=x", "stray"])
    with pytest.raises(cfg.ConfigError, match=r"seed\.deep|accepted is an integer"):
        cfg.load(Run, None, ["--task=x", "--seed.deep=1"])


def test_missing_file_names_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="not-there"):
        cfg.load(Run, "not-there")
