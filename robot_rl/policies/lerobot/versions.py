"""The only module that names LeRobot's modules: what differs between its versions is switched here.

Checked against 0.4.4. A checkpoint is a folder, and backbones take their weights from it. A language-conditioned policy also names the
folder of its tokenizer and its backbone's configuration (``vlm_model_name``).
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PREPROCESSOR_FILE, POSTPROCESSOR_FILE = "policy_preprocessor.json", "policy_postprocessor.json"
TESTED = ("0.4",)


class LeRobotMissing(ImportError):
    """LeRobot, or what one of its policies needs, is not installed."""


def installed_version() -> str:
    """Raises LeRobotMissing where LeRobot is not installed, ValueError for a version that was never tried."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("lerobot")
    except PackageNotFoundError:
        raise LeRobotMissing(
            "this is a LeRobot checkpoint, and LeRobot is not installed: pip install 'lerobot>=0.4.4,<0.5'"
        ) from None
    if not found.startswith(tuple(f"{t}." for t in TESTED)):
        raise ValueError(
            f"lerobot {found} is installed; accepted is {' or '.join(f'{t}.x' for t in TESTED)}, which this adapter knows"
        )
    return found


def policy_type(folder: Path) -> str | None:
    """``type`` of a LeRobot checkpoint's ``config.json``; None where the folder holds none. LeRobot need not be installed."""
    try:
        data = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(data, dict) and isinstance(data.get("type"), str) and "input_features" in data
    return data["type"] if known else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LeRobot prints to standard output while it loads, which is where ``--json`` answers go."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def read_config(folder: Path, device: str) -> Any:
    """The checkpoint's configuration object."""
    installed_version()
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies import factory  # noqa: F401  (registers every kind of policy)

    with _quiet():
        config = PreTrainedConfig.from_pretrained(str(folder), local_files_only=True)
    config.device = device
    if hasattr(config, "pretrained_backbone_weights"):
        config.pretrained_backbone_weights = None
    if hasattr(config, "load_vlm_weights"):
        config.load_vlm_weights = False
    if hasattr(config, "compile_model"):
        config.compile_model = False
    return config


def build(folder: Path, config: Any) -> Any:
    """The policy with its weights, in eval mode, frozen.

    Raises:
        LeRobotMissing: a package that this kind of policy needs is missing. ValueError: weights that do not fit.
    """
    from lerobot.policies.factory import get_policy_class

    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}: a checkpoint saved with save_pretrained has one")
    try:
        with _quiet():
            policy = get_policy_class(config.type).from_pretrained(str(folder), config=config, strict=True)
    except ImportError as error:
        raise LeRobotMissing(
            f"a {config.type} policy needs more than is installed ({error}): pip install 'robot_rl[vla]'"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights and {CONFIG_FILE} do not fit together: {error}") from error
    return policy.eval().requires_grad_(False)


def processors(folder: Path, config: Any, device: str) -> tuple[Any, Any]:
    """Pre- and post-processor pipelines as saved beside the weights.

    Raises:
        FileNotFoundError: a checkpoint from before LeRobot kept them in files. ValueError: one that would run foreign code.
    """
    from lerobot.policies.factory import make_pre_post_processors

    for name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: it was saved before LeRobot 0.4; python -m lerobot.processor.migrate_policy_normalization "
                "--pretrained-path FOLDER writes a checkpoint that has it"
            )
        for step in json.loads(file.read_text(encoding="utf-8")).get("steps", []):
            if "registry_name" not in step:
                raise ValueError(
                    f"{file}: step {step.get('class')!r} is code named by its import path; accepted are LeRobot's registered steps"
                )
    with _quiet():
        return make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": device}},
            postprocessor_overrides={"device_processor": {"device": device}},
        )


def step_name(step: Any) -> str:
    """Registry name of a processor step."""
    return getattr(type(step), "_registry_name", type(step).__name__)


def action_transition(action: Any) -> Any:
    from lerobot.processor.converters import create_transition

    return create_transition(action=action)


def action_of(transition: Any) -> Any:
    from lerobot.processor.core import TransitionKey

    return transition[TransitionKey.ACTION]


def feature_kind(feature: Any) -> str:
    """``STATE``, ``ENV``, ``VISUAL``, ``ACTION`` ..."""
    return str(feature.type.value)


def action_normalization(step: Any) -> tuple[str, dict[str, Any]]:
    """Mode (``MIN_MAX``, ``MEAN_STD``, ``IDENTITY`` ...) and statistics of the action in a normaliser step."""
    modes = {str(k.value): str(v.value) for k, v in step.norm_map.items()}
    statistics = {k: v for k, v in step._tensor_stats.get("action", {}).items() if v.ndim == 1}
    return (modes.get("ACTION", "IDENTITY") if step._tensor_stats.get("action") else "IDENTITY"), statistics


def diffusion_parts(policy: Any) -> tuple[Any, Any]:
    """(conditioning of a batch, sampler(batch size, conditioning, noise)) of a DiffusionPolicy."""
    model = policy.diffusion
    return model._prepare_global_conditioning, lambda n, c, w: model.conditional_sample(n, global_cond=c, noise=w)


def diffusion_steps(policy: Any) -> tuple[Any, list[tuple[int, float, float]], str, float | None]:
    """What the sampler of a DiffusionPolicy on DDIM consists of.

    Returns: network(x, times, global_cond=...); per step its time and the cumulative alphas before and after it; what the network
    predicts; the bound of the clean sample, or None.
    """
    model, scheduler = policy.diffusion, policy.diffusion.noise_scheduler
    scheduler.set_timesteps(model.num_inference_steps)
    stride = scheduler.config.num_train_timesteps // model.num_inference_steps
    steps = []
    for t in scheduler.timesteps.tolist():
        after = scheduler.alphas_cumprod[t - stride] if t >= stride else scheduler.final_alpha_cumprod
        steps.append((t, float(scheduler.alphas_cumprod[t]), float(after)))
    bound = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
    return model.unet, steps, str(scheduler.config.prediction_type), bound
