"""Heads that see with a frozen encoder of their own, whatever their base reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_kit import tiny
from safetensors.torch import save_file
from spine_kit import IMAGE, STATE, compact, observations

from robot_rl import cli
from robot_rl.policies.base import prior_noise
from robot_rl.policies.checkpoint import save_policy
from robot_rl.policies.inpainting import why_not
from robot_rl.policies.loading import load_policy, write_reference
from robot_rl.policies.seeing import SeeingPolicy, blind
from robot_rl.training import posttrain
from robot_rl.training.artifact import export_run
from robot_rl.training.evaluate import load_acting
from robot_rl.vision.encoders import squeezenet_features

SIZE = {"cameras": {IMAGE: [32, 32, 3]}, "encoder": {"size": 32}}


@pytest.fixture
def eyeless(tmp_path) -> Path:
    """A base that reads a state and no picture."""
    save_policy(compact(), tmp_path / "base")
    return tmp_path / "base"


def seen(policy, batch: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (batch, 1, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return observations(blind(policy), batch) | {IMAGE: picture}


def test_the_base_stays_what_it_was_and_heads_read_more(eyeless) -> None:
    plain, policy = load_policy(eyeless), load_policy(eyeless, options={"vision": SIZE})
    assert isinstance(policy, SeeingPolicy)
    own, width = plain.spec.conditioning_dim, 64 * 2 * 2
    assert policy.spec.conditioning_dim == own + width
    assert set(policy.spec.observation_features) == {STATE, IMAGE}
    look = seen(policy)
    conditioning, noise = policy.encode(look), prior_noise(policy, 5, torch.Generator().manual_seed(1))
    assert conditioning.shape == (5, own + width)
    assert torch.equal(conditioning, policy.encode(look))
    assert torch.equal(conditioning[:, :own], plain.encode(look))
    assert torch.equal(policy.sample(conditioning, noise), plain.sample(plain.encode(look), noise))
    other = policy.encode(look | {IMAGE: 255 - look[IMAGE]})
    assert torch.equal(other[:, :own], conditioning[:, :own])
    assert not torch.allclose(other[:, own:], conditioning[:, own:])
    features = conditioning[:, own:]
    torch.testing.assert_close(features.mean(1), torch.zeros(5), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(features.std(1, correction=0), torch.ones(5), atol=1e-3, rtol=0.0)
    assert why_not(policy) == "", "a running chunk can be continued as by the base itself"
    with pytest.raises(KeyError, match=IMAGE):
        policy.encode(observations(plain, 2))


def test_what_was_seen_with_is_part_of_which_base_it_is(eyeless) -> None:
    hashes = {
        load_policy(eyeless, options=o).spec.base_hash
        for o in (
            {},
            {"vision": SIZE},
            {"vision": {**SIZE, "grid": 1}},
            {"vision": {**SIZE, "encoder": {"size": 32, "seed": 1}}},
        )
    }
    assert len(hashes) == 4


def test_a_reference_finds_the_weights_again_and_refuses_others(eyeless, tmp_path) -> None:
    weights = tmp_path / "squeezenet.safetensors"

    def write(seed: int) -> None:
        torch.manual_seed(seed)
        save_file({f"features.{k}": v for k, v in squeezenet_features().state_dict().items()}, weights)

    write(0)
    vision = {**SIZE, "encoder": {"kind": "squeezenet", "weights": str(weights), "size": 32, "layer": 4}}
    policy = load_policy(eyeless, options={"vision": vision})
    write_reference(policy, tmp_path / "run" / "base", eyeless, {"vision": vision})
    again = load_policy(tmp_path / "run" / "base")
    look = seen(policy)
    assert torch.equal(again.encode(look), policy.encode(look))
    write(1)
    with pytest.raises(ValueError, match="another checkpoint, or loaded with other options"):
        load_policy(tmp_path / "run" / "base")


@pytest.mark.parametrize(
    ("vision", "says"),
    [
        ({"cameras": {}}, "cameras is empty"),
        ({"cameras": {"front": [32, 32, 3]}}, "observation.images.front with"),
        ({**SIZE, "grid": 0}, "grid=0: accepted are 1 to 16"),
        ({**SIZE, "eyes": 2}, "eyes = 2: no such key"),
        ({**SIZE, "encoder": {"kind": "timm"}}, "encoder.weights is empty: timm needs weights on disk"),
        ({**SIZE, "encoder": {"kind": "squeezenet", "weights": "/nowhere"}}, "no such file or folder"),
    ],
)
def test_mistakes_are_told_by_name(eyeless, vision, says) -> None:
    with pytest.raises(ValueError, match=says):
        load_policy(eyeless, options={"vision": vision})


def test_a_camera_of_another_size_is_refused(tmp_path) -> None:
    save_policy(compact(images=True), tmp_path / "base")
    with pytest.raises(ValueError, match=r"is \[64, 64, 3\]; the base reads \[32, 32, 3\]"):
        load_policy(tmp_path / "base", options={"vision": {"cameras": {IMAGE: [64, 64, 3]}}})


def test_a_whole_run_sees_and_is_exported_with_its_eyes(tmp_path) -> None:
    quick = {"demos": {"episodes": 4}, "gate": {"n_min": 2, "n_max": 2, "reference_n_min": 2}}
    few = {"reference_episodes": 2, "curve_episodes": 2, "final_episodes": 2}
    posttrain.run(tiny(tmp_path / "clone", **quick, evaluation=few, schedule={"env_steps": 40}))
    camera, weights = "observation.images.front", tmp_path / "squeezenet.safetensors"
    save_file({f"features.{k}": v for k, v in squeezenet_features().state_dict().items()}, weights)
    vision = {
        "cameras": {camera: [48, 48, 3]},
        "encoder": {"kind": "squeezenet", "weights": str(weights), "size": 48, "layer": 4},
        "grid": 1,
    }

    run = tmp_path / "run"
    posttrain.run(tiny(
        run, **quick, evaluation=few, schedule={"env_steps": 120, "random_shift": 4, "shift_views": 2},
        env={"options": {"max_episode_steps": 30, "cameras": ["front"], "image_size": 48}},
        base={"path": str(tmp_path / "clone" / "base"), "options": {"vision": vision}},
    ))  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    assert result["updates"] > 0
    acting, _ = load_acting(run, "policy", "cpu")
    assert isinstance(acting.base, SeeingPolicy)
    export_run(run, tmp_path / "out")
    shutil.rmtree(run)
    weights.unlink()
    shutil.rmtree(tmp_path / "clone")
    carried = Path(shutil.move(tmp_path / "out", tmp_path / "carried"))
    alone, _ = load_acting(carried, "policy", "cpu")
    assert alone.base.spec.base_hash == acting.base.spec.base_hash
    assert str(tmp_path) not in (carried / "base" / "policy.json").read_text()


def test_doctor_says_what_heads_see(eyeless, capsys) -> None:
    assert cli.main(["doctor", str(eyeless), "--options", json.dumps({"vision": SIZE})]) == 0
    said = capsys.readouterr().out
    assert "heads also read 256 numbers a camera" in said


def features_of(eyeless: Path, encoder: dict) -> torch.Tensor:
    policy = load_policy(eyeless, options={"vision": {"cameras": {IMAGE: [32, 32, 3]}, "encoder": encoder, "grid": 1}})
    look = seen(policy, 2)
    conditioning = policy.encode(look)
    assert torch.equal(conditioning, policy.encode(look))
    assert torch.isfinite(conditioning).all()
    alone = policy.encode({n: v[:1] for n, v in look.items()})
    torch.testing.assert_close(alone, conditioning[:1], atol=1e-4, rtol=1e-4)  # who is in the batch beside it does not matter
    assert not any(m.training for m in policy.encoder.network.modules())
    return conditioning[:, blind(policy).spec.conditioning_dim :]


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("vit_tiny_patch16_224", 192)])
def test_encoders_of_timm(eyeless, tmp_path, name, width) -> None:
    timm = pytest.importorskip("timm", reason="pip install timm")
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, **({"img_size": 32} if name.startswith("vit") else {}))
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "weights.safetensors")
    encoder = {"kind": "timm", "model": name, "weights": str(tmp_path / "weights.safetensors"), "size": 32}
    assert features_of(eyeless, encoder).shape == (2, width)


@pytest.mark.parametrize("name", ["Clip", "Siglip", "Dinov2"])
def test_encoders_of_transformers(eyeless, tmp_path, name) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'robot_rl[vla]'")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    if name == "Dinov2":
        model, processor = transformers.Dinov2Model(transformers.Dinov2Config(**small)), transformers.BitImageProcessor()
    else:
        upper = name.upper() if name == "Clip" else name
        text = {k: v for k, v in small.items() if "size" not in k} | {"hidden_size": 16, "vocab_size": 32}
        config = getattr(transformers, f"{upper}Config")(vision_config=small, text_config=text)
        model, processor = getattr(transformers, f"{upper}Model")(config), getattr(transformers, f"{upper}ImageProcessor")()
    model.save_pretrained(tmp_path / "weights")
    processor.save_pretrained(tmp_path / "weights")
    encoder = {"kind": "transformers", "weights": str(tmp_path / "weights"), "size": 32}
    assert features_of(eyeless, encoder).shape == (2, 16)
