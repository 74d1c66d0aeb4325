"""``robot-rl doctor POLICY``: what a policy is, and which heads it supports, with the reason where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class HeadSupport:
    """Whether one kind of head fits a policy; ``text`` says why not, or what to know."""

    head: str
    supported: bool
    text: str


@dataclass(frozen=True)
class PolicyReport:
    """What ``robot-rl doctor POLICY`` prints."""

    policy: str
    kind: str
    sampler: str
    num_steps: int
    horizon: int
    n_action_steps: int
    n_obs_steps: int
    noise_shape: tuple[int, int] | None
    conditioning_dim: int
    features: dict[str, str]
    action: list[str]
    base_hash: str
    heads: list[HeadSupport]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return any(h.supported for h in self.heads)


def head_kinds() -> tuple[str, ...]:
    """Every kind of head that a configuration may name."""
    from robot_rl.training.config import HeadConfig

    return get_args(get_type_hints(HeadConfig)["kind"])


def _fit(base: Any, kind: str) -> str:
    """What to know of a kind of head that fits. Raises ValueError or AttributeError with what the head itself says against it."""
    from robot_rl.heads.guidance import need_compact
    from robot_rl.heads.guidance_config import GuidanceConfig
    from robot_rl.learners.config import OffPolicyConfig
    from robot_rl.training.build import build_head
    from robot_rl.training.config import ALGORITHMS, HeadConfig

    algorithms = f"algorithms {', '.join(ALGORITHMS[kind])}"
    if kind == "reference":  # it is nothing without a store of references, which a policy alone does not bring
        need_compact(base, "following a reference")
        return f"needs head.reference.references; {algorithms}"
    guided = GuidanceConfig(value_weight=1.0) if kind == "guided" else GuidanceConfig()
    head = build_head(base, HeadConfig(kind=kind, guided=guided), 0, OffPolicyConfig())  # type: ignore[arg-type]
    return f"{sum(p.numel() for p in head.parameters()):,} parameters; {algorithms}"


def examine_policy(source: str, options: dict[str, Any] | None = None) -> PolicyReport:
    """Load the policy, and build every kind of head on it: what refuses says why itself.

    Raises:
        FileNotFoundError, ValueError: it is no policy that can be a base.
    """
    from robot_rl.policies.loading import load_policy

    path = Path(source)
    base = load_policy(path / "base" if (path / "config.yaml").exists() else source, "cpu", options)
    spec, heads = base.spec, []
    for kind in head_kinds():
        try:
            heads.append(HeadSupport(kind, True, _fit(base, kind)))
        except (ValueError, AttributeError) as error:
            heads.append(HeadSupport(kind, False, str(error)))
    return PolicyReport(
        policy=source, kind=type(base).__name__, sampler=spec.sampler, num_steps=spec.num_steps, horizon=spec.horizon,
        n_action_steps=spec.n_action_steps, n_obs_steps=spec.n_obs_steps, noise_shape=spec.noise_shape,
        conditioning_dim=spec.conditioning_dim,
        features={n: f"{f.dtype} {'x'.join(map(str, f.shape))}" for n, f in spec.observation_features.items()},
        action=[
            f"{n} [{lo:.3g}, {hi:.3g}] {k}, {m}"
            for n, lo, hi, k, m in zip(
                spec.action.names, spec.action.low, spec.action.high, spec.action.kind, spec.action.mode, strict=True
            )
        ],
        base_hash=spec.base_hash, heads=heads, notes=list(getattr(base, "notes", ())),
    )  # fmt: skip


def render_policy(report: PolicyReport) -> str:
    noise = "takes no noise" if report.noise_shape is None else f"noise {report.noise_shape[0]} x {report.noise_shape[1]}"
    lines = [
        f"{report.policy}: {report.kind}, base {report.base_hash}",
        f"  sampler   {report.sampler}, {report.num_steps} step{'s' * (report.num_steps > 1)}; {noise}",
        f"  chunk     {report.horizon} rows, {report.n_action_steps} run before it plans again; reads {report.n_obs_steps} frame"
        f"{'s' * (report.n_obs_steps > 1)}; heads read {report.conditioning_dim} numbers",
        *(f"  reads     {name}: {text}" for name, text in report.features.items()),
        *(f"  action    {text}" for text in report.action),
        *(f"  note      {text}" for text in report.notes),
        *(f"  {'yes' if h.supported else 'no ':3} {h.head:18} {h.text}" for h in report.heads),
    ]
    return "\n".join(lines)
