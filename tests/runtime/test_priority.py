"""Processors that are kept awake, on a file in the place of the kernel's."""

from __future__ import annotations

import os

import pytest

from robot_rl.runtime import priority


@pytest.fixture
def latency(tmp_path, monkeypatch):
    file = tmp_path / "cpu_dma_latency"
    file.write_bytes(b"")
    monkeypatch.setattr(priority, "LATENCY", file)
    return file


def open_files() -> list[str]:
    return [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]


def test_the_wish_is_zero_microseconds_and_lasts_as_long_as_the_file_is_open(latency):
    awake = priority.KeepAwake()
    assert awake.set(True)
    assert awake.set(True)  # once is enough
    assert latency.read_bytes() == bytes(4)
    assert open_files().count(str(latency)) == 1
    assert not awake.set(False)
    assert str(latency) not in open_files()
    assert not awake.on


def test_without_the_file_or_the_right_to_it_nothing_is_promised(latency):
    latency.unlink()
    awake = priority.KeepAwake()
    assert not awake.set(True)
    assert not awake.on
    assert not awake.set(False)
