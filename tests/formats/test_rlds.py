"""RLDS datasets as TensorFlow Datasets keeps them: written here with Google's own protocol buffers, read without TensorFlow."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robot_rl.replay.importers import FormatError, detect, open_dataset

pytest.importorskip("google.protobuf")
crc32c = pytest.importorskip("google_crc32c")


def example_class() -> Any:
    """``tf.train.Example``, from its published definition."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    for name, kind in (("BytesList", field.TYPE_BYTES), ("FloatList", field.TYPE_FLOAT), ("Int64List", field.TYPE_INT64)):
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=field.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in ((1, "BytesList"), (2, "FloatList"), (3, "Int64List")):
        feature.field.add(
            name=name.lower(), number=number, type=field.TYPE_MESSAGE, type_name=f".tensorflow.{name}",
            label=field.LABEL_OPTIONAL, oneof_index=0,
        )  # fmt: skip
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, type_name=".tensorflow.Feature", label=field.LABEL_OPTIONAL
    )
    features.field.add(
        name="feature",
        number=1,
        type=field.TYPE_MESSAGE,
        type_name=".tensorflow.Features.FeatureEntry",
        label=field.LABEL_REPEATED,
    )
    example = file.message_type.add(name="Example")
    example.field.add(
        name="features", number=1, type=field.TYPE_MESSAGE, type_name=".tensorflow.Features", label=field.LABEL_OPTIONAL
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def record(values: dict[str, Any]) -> bytes:
    example = example_class()()
    for name, rows in values.items():
        feature = example.features.feature[name]
        if isinstance(rows, list):
            feature.byteslist.value.extend(rows)
        elif rows.dtype.kind == "f":
            feature.floatlist.value.extend(rows.ravel().tolist())
        else:
            feature.int64list.value.extend(rows.ravel().astype(np.int64).tolist())
    data = example.SerializeToString()

    def masked(raw: bytes) -> bytes:
        crc = crc32c.value(raw)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    head = struct.pack("<Q", len(data))
    return head + masked(head) + data + masked(data)


def png(frame: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    return {"tensor": {"shape": {"dimensions": [str(d) for d in shape]} if shape else {}, "dtype": dtype, "encoding": "none"}}


OBSERVATION = {
    "image_0": {"image": {"shape": {"dimensions": ["16", "24", "3"]}, "dtype": "uint8", "encodingFormat": "png"}},
    "state": tensor("float32", 4), "gripper": tensor("float64", 1), "embedding": tensor("float32", 512),
}  # fmt: skip
STEP = {
    "observation": {"featuresDict": {"features": OBSERVATION}}, "action": tensor("float32", 3), "reward": tensor("float32"),
    "is_terminal": tensor("bool"), "language_instruction": {"text": {}},
}  # fmt: skip


def made(steps: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    last = np.arange(steps) == steps - 1
    return {
        "steps/observation/image_0": [png(f) for f in rng.integers(0, 256, (steps, 16, 24, 3), np.uint8)],
        "steps/observation/state": rng.normal(size=(steps, 4)).astype(np.float32),
        "steps/observation/gripper": rng.normal(size=(steps, 1)),
        "steps/observation/embedding": np.zeros((steps, 512), np.float32), "steps/action": rng.normal(size=(steps, 3)).astype(np.float32),
        "steps/reward": last.astype(np.float32), "steps/is_terminal": last, "steps/language_instruction": [b"pick up the cup"] * steps,
        "episode_metadata/file_path": [b"somewhere"],
    }  # fmt: skip


def write(folder: Path, episodes: list[dict[str, Any]], step: dict[str, Any] = STEP) -> Path:
    version = folder / "1.0.0"
    version.mkdir(parents=True)
    steps = {"sequence": {"feature": {"featuresDict": {"features": step}}, "length": "-1"}}
    (version / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": steps}}}))
    (version / "dataset_info.json").write_text(json.dumps({"name": folder.name, "version": "1.0.0"}))
    for i in range(0, len(episodes), 2):  # two episodes a file
        name = f"{folder.name}-train.tfrecord-{i // 2:05d}-of-{(len(episodes) + 1) // 2:05d}"
        (version / name).write_bytes(b"".join(map(record, episodes[i : i + 2])))
    return folder


def test_episodes_come_out_as_they_were_recorded(tmp_path):
    episodes = [made(5, 0), made(4, 1), made(6, 2)]
    source = write(tmp_path / "bridge_made", episodes)
    assert detect(source) == detect(source / "1.0.0") == "rlds"
    importer = open_dataset(source, control_hz=5.0)
    told = importer.describe()
    assert told.n_episodes == 3
    assert {n: f.shape for n, f in told.observation_features.items()} == {
        "observation.images.image_0": (16, 24, 3), "observation.state": (4,),
    }  # fmt: skip
    assert told.extra["observations_left_out"] == ["embedding", "gripper"]
    np.testing.assert_allclose(told.action.low, np.concatenate([e["steps/action"] for e in episodes]).min(0), rtol=1e-6)
    read = list(importer.episodes())
    for ours, theirs in zip(episodes, read, strict=True):
        np.testing.assert_array_equal(theirs.action, ours["steps/action"])
        np.testing.assert_array_equal(theirs.observations["observation.state"][:-1], ours["steps/observation/state"])
        assert png(theirs.observations["observation.images.image_0"][2]) == ours["steps/observation/image_0"][2]
        np.testing.assert_array_equal(theirs.reward, ours["steps/reward"])
        assert (theirs.terminated[-1], theirs.meta.success, theirs.meta.task) == (True, True, "pick up the cup")
    assert [e.meta.episode_id for e in read] == [f"bridge_made-{i:06d}" for i in range(3)]
    assert read[0].stamp_ns[1] == 200_000_000
    (one,) = open_dataset(source, episodes=[1], state_keys=["gripper", "state"], image_keys=[]).episodes()
    np.testing.assert_allclose(
        one.observations["observation.state"][:-1, :1], episodes[1]["steps/observation/gripper"], rtol=1e-6
    )
    strict = next(iter(open_dataset(source, last_step="observation").episodes()))
    assert len(strict) == 4
    np.testing.assert_array_equal(strict.observations["observation.state"], episodes[0]["steps/observation/state"])


def test_actions_in_parts_need_an_order(tmp_path):
    parts = {"featuresDict": {"features": {"world_vector": tensor("float32", 2), "open_gripper": tensor("bool")}}}
    episode = {k: v for k, v in made(3, 0).items() if k != "steps/action"}
    episode |= {"steps/action/world_vector": np.ones((3, 2), np.float32), "steps/action/open_gripper": np.array([0, 1, 1])}
    source = write(tmp_path / "parts", [episode], STEP | {"action": parts})
    with pytest.raises(ValueError, match="the action is a dictionary; accepted are some of world_vector, open_gripper"):
        open_dataset(source)
    (read,) = open_dataset(source, action_keys=["open_gripper", "world_vector"]).episodes()
    assert read.action.tolist() == [[0, 1, 1], [1, 1, 1], [1, 1, 1]]


def test_wrong_options_and_damage_are_named(tmp_path):
    source = write(tmp_path / "d", [made(4, 0)])
    with pytest.raises(ValueError, match=r"split='val': .* has train"):
        open_dataset(source, split="val")
    with pytest.raises(ValueError, match=r"state_keys=\['pose'\]: accepted are some of state, gripper, embedding"):
        open_dataset(source, state_keys=["pose"])
    with pytest.raises(ValueError, match=r"image_keys=\['wrist'\]: \['wrist'\] are not there; accepted are some of image_0"):
        open_dataset(source, image_keys=["wrist"])
    (file,) = (source / "1.0.0").glob("*.tfrecord-*")
    whole = file.read_bytes()
    for damaged, message in (
        (whole[:-7], "record 0 is cut off"), (whole[:200] + bytes([whole[200] ^ 0xFF]) + whole[201:], "checksum does not fit"),
        (b"x" * 64, "checksum of its length does not fit"),
    ):  # fmt: skip
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match=message):
            open_dataset(source)
    short = made(4, 0)
    short["steps/observation/state"] = short["steps/observation/state"][:-1]
    with pytest.raises(FormatError, match=r"observation.state has 3 rows, the action 4"):
        list(open_dataset(write(tmp_path / "e", [short])).episodes())
