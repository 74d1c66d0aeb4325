"""A tiny OpenVLA as a base policy: the words transformers itself would write, noise that chooses them, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import openvla_kit as kit
import pytest
import torch

from robot_rl.cli.policy_report import examine_policy
from robot_rl.policies.loading import load_policy
from robot_rl.policies.openvla.network import TransformersMissing
from robot_rl.policies.openvla.tokens import ActionBins, quantile
from robot_rl.policies.openvla.vision import VisionTransformer


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="OpenVLA needs transformers: pip install 'robot_rl[vla]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, transformers):
    return kit.openvla(tmp_path_factory.mktemp("openvla") / "checkpoint")


def load(folder, **options):
    return load_policy(folder, options=kit.OPTIONS | options)


def test_it_writes_what_transformers_would(folder):
    base = load(folder)
    assert base.spec.noise_shape is None
    assert base.spec.horizon == 1
    observation = kit.seen(4)
    ours = base.unnormalize_action(base.sample(base.encode(observation), None)).numpy()[:, 0]
    network, words = base.network, kit.TEXT + kit.BINS
    allowed = list(range(words - kit.BINS, words))
    prompt = network.prompt(observation[kit.CAMERA][:, 0])
    assert prompt.shape[1] == 1 + 4 + len(network.words) - 1  # <s>, four patches, the instruction
    theirs = network.language.generate(
        inputs_embeds=prompt, max_new_tokens=3, do_sample=False, prefix_allowed_tokens_fn=lambda *_: allowed, pad_token_id=0
    )[:, -3:].numpy()
    edges = np.linspace(-1, 1, kit.BINS)  # from here on as OpenVLA's own predict_action does it
    unit = ((edges[:-1] + edges[1:]) / 2)[np.clip(words - theirs - 1, 0, kit.BINS - 2)]
    low, high, mask = np.array([-0.5, -2.0, 0.0]), np.array([1.5, 2.0, 1.0]), np.array([True, True, False])
    np.testing.assert_allclose(ours, np.where(mask, 0.5 * (unit + 1) * (high - low) + low, unit), atol=1e-5)


def test_its_eyes_are_timms():
    timm = pytest.importorskip("timm", reason="compared with timm's own vision transformer where it is installed")
    for prefix, scaled in ((5, True), (0, False)):
        weights = kit.vit(32, 3, prefix, scaled, torch.Generator().manual_seed(3))
        theirs = timm.models.VisionTransformer(
            img_size=kit.SIDE, patch_size=kit.PATCH, embed_dim=32, depth=3, num_heads=16, mlp_ratio=2.0, num_classes=0,
            class_token=prefix > 0, reg_tokens=max(prefix - 1, 0), no_embed_class=True, init_values=1.0 if scaled else None,
            global_pool="token" if prefix else "avg", fc_norm=False,
        ).eval()  # fmt: skip
        theirs.load_state_dict({n.replace("scale_factor", "gamma"): v for n, v in weights.items()})
        picture = torch.randn(2, 3, kit.SIDE, kit.SIDE)
        with torch.no_grad():
            (wanted,) = theirs.get_intermediate_layers(picture, n={1})
            found = VisionTransformer(weights)(picture)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_noise_chooses_the_words(folder):
    base = load(folder, decoding="sample", horizon=2)
    assert base.spec.noise_shape == (2, 3)
    conditioning, noise = base.encode(kit.seen(3)), torch.randn(3, 2, 3)
    chunk = base.sample(conditioning, noise)
    assert chunk.shape == (3, 2, 3)
    assert torch.equal(chunk, base.sample(conditioning, noise))
    assert torch.equal(chunk[[2, 0]], base.sample(conditioning[[2, 0]], noise[[2, 0]]))
    many = base.sample(conditioning[:1].expand(2000, -1), torch.randn(2000, 2, 3, generator=torch.Generator().manual_seed(0)))
    written = torch.zeros(1, 6, dtype=torch.long)
    expected = base.network.log_probs(base.prompts(conditioning[:1]), written)[0, 0].exp()
    mean = (expected * base.network.bins.value(torch.arange(kit.BINS))).sum()
    assert abs(float(many[:, 0, 0].mean() - mean)) < 4 * float(many[:, 0, 0].std()) / 2000**0.5
    with pytest.raises(ValueError, match=r"noise is missing; accepted is \(B, 2, 3\)"):
        base.sample(conditioning, None)


def test_likelihoods_are_those_of_the_writing(folder):
    base = load(folder, decoding="sample")
    conditioning = base.encode(kit.seen(5))
    kept = []

    def choose(place, log_prob):
        kept.append(log_prob)
        return quantile(log_prob, torch.full((5,), 0.3 * place))

    written = base.network.write(base.network.read(base.prompts(conditioning)), 3, choose)
    again = base.network.log_probs(base.prompts(conditioning), written)
    torch.testing.assert_close(again, torch.stack(kept, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.exp().sum(-1), torch.ones(5, 3))


def test_bins_and_quantiles():
    bins = ActionBins(words=300, bins=4)
    assert bins.word(torch.tensor([0, 3])).tolist() == [299, 296]
    torch.testing.assert_close(bins.value(torch.arange(4)), torch.tensor([-2 / 3, 0.0, 2 / 3, 2 / 3]))
    assert bins.of_words(torch.arange(310.0)).tolist() == [299.0, 298.0, 297.0, 296.0]
    log_prob = torch.tensor([0.25, 0.25, 0.25, 0.25]).log().expand(5, 4)
    assert quantile(log_prob, torch.tensor([-9.0, -0.5, 0.1, 0.5, 9.0])).tolist() == [0, 1, 2, 2, 3]


def test_the_instruction_the_picture_and_the_cut_matter(folder):
    base, observation = load(folder), kit.seen(2)
    other = load(folder, task="put it away")
    assert other.spec.base_hash != base.spec.base_hash
    assert not torch.equal(other.encode(observation), base.encode(observation))
    cut = load(folder, picture={"size": [40, 56], "crop": [0, 8, 40, 40], "resize": [28, 28]})
    assert cut.spec.observation_features[kit.CAMERA].shape == (40, 56, 3)
    assert cut.encode({kit.CAMERA: torch.zeros(2, 1, 40, 56, 3, dtype=torch.uint8)}).shape == (2, cut.spec.conditioning_dim)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"camera": ""}, "camera='': accepted is the recorded picture"),
        ({"task": ""}, "task='': accepted is the instruction"),
        ({"unnorm_key": "bridge"}, "unnorm_key='bridge'; accepted are tabletop"),
        ({"decoding": "beam"}, "decoding='beam': accepted are greedy, sample"),
        ({"action": {"low": [0], "high": [1]}}, "has 1 dimensions; .* writes 3"),
        ({"picture": {"size": [28, 30]}}, r"becomes \(28, 30\); the checkpoint reads \(28, 28\)"),
        ({"beams": 3}, "unknown option 'beams'"),
    ],
)
def test_what_is_wrong_is_named(folder, options, said):
    with pytest.raises(ValueError, match=said):
        load(folder, **options)


def test_weights_that_do_not_fit_are_refused(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fit together"):
        load(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load(broken)


def test_without_transformers_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TransformersMissing, match=r"pip install 'robot_rl\[vla\]'"):
        load(folder)


def test_the_doctor_says_which_heads_fit(folder):
    greedy = {h.head: h for h in examine_policy(str(folder), kit.OPTIONS).heads}
    assert all(greedy[k].supported for k in ("token", "residual", "chunk_policy"))
    assert not greedy["latent_noise"].supported
    drawn = {h.head: h for h in examine_policy(str(folder), kit.OPTIONS | {"decoding": "sample"}).heads}
    assert all(drawn[k].supported for k in ("token", "residual", "edit", "best_of_n", "latent_noise"))
