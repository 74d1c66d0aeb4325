"""A gamepad's tape: read from a bag, played at its own pace, let go of at its end."""

from __future__ import annotations

import pytest

pytest.importorskip("mcap", reason="pip install 'robot_rl[mcap]'")
pytest.importorskip("rosbags", reason="pip install 'robot_rl[mcap]'")

from robot_rl.intervention.recorded import Tape, TapePlayer
from robot_rl.intervention.teleop import Gamepad
from robot_rl.replay.importers.mcap_messages import TypeStore, mcap_module

MS = 1_000_000
JOY = "sensor_msgs/msg/Joy"


def bag(path, rows) -> None:
    mcap, types = mcap_module(), TypeStore()
    with open(path, "wb") as file:
        writer = mcap.writer.Writer(file)
        writer.start(profile="ros2")
        schema = writer.register_schema(JOY, "ros2msg", types.definition(JOY).encode())
        channel = writer.register_channel("/pad/joy", "cdr", schema)
        import numpy as np

        for at, axes, buttons in rows:
            message = types.t[JOY](
                header=types.header(at), axes=np.array(axes, np.float32), buttons=np.array(buttons, np.int32)
            )
            writer.add_message(channel, at, types.serialize(message, JOY), at)
        writer.finish()


def test_a_tape_drives_as_the_person_did_and_lets_go_at_its_end(tmp_path):
    held = [0, 0, 0, 0, 0, 1]
    bag(tmp_path / "a.mcap", [(5000 * MS, [0.0, 1.0], [0] * 6), (5020 * MS, [0.0, 1.0], held), (5060 * MS, [0.0, -1.0], held)])
    pad = Gamepad()
    player = TapePlayer(Tape.read(tmp_path / "a.mcap", "/pad/joy"), pad)
    now = 10**12
    player.feed(now)
    assert not pad.present(now)  # nothing before it is started
    for _ in range(2):  # each episode from the beginning
        player.start(now)
        player.feed(now)
        assert not pad.poll(now).engaged
        player.feed(now + 30 * MS)
        reading = pad.poll(now + 30 * MS)
        assert reading.engaged
        assert reading.twist[0] == 1.0
        now += 60 * MS
        player.feed(now)
        assert not pad.poll(now).engaged  # the end
        assert not player.playing
        now += 1000 * MS
    player.start(now)
    player.feed(now + 30 * MS)
    player.stop(now + 31 * MS)  # the episode is over
    assert not pad.poll(now + 31 * MS).engaged


def test_a_bag_without_that_gamepad_is_refused(tmp_path):
    bag(tmp_path / "a.mcap", [(0, [0.0], [0])])
    with pytest.raises(ValueError, match=r"replay_topic='/joy': a\.mcap has /pad/joy"):
        Tape.read(tmp_path / "a.mcap")
    with pytest.raises(ValueError, match="accepted is an MCAP file"):
        Tape.read(tmp_path / "b.mcap")
