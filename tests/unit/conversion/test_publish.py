from __future__ import annotations

import os

import pytest

from mka_megatron.config.errors import ConfigError
from mka_megatron.conversion.publish import published


def test_what_a_killed_process_left_is_removed_and_a_running_one_s_is_not(tmp_path, monkeypatch):
    left = tmp_path / ".out.tmp-1"
    left.mkdir()
    (left / "half").write_text("x")
    (tmp_path / ".outer.tmp-1").mkdir()  # of another output
    with published(tmp_path / "out", 0) as first:
        assert not left.exists()
        (first / "file").write_text("first")
        monkeypatch.setattr(os, "getpid", lambda: 2)
        with pytest.raises(ConfigError, match="cannot be written"), published(tmp_path / "out", 0) as second:
            assert first != second and first.is_dir() and second.is_dir()
            (second / "file").write_text("second")
            first.rename(tmp_path / "out")  # the first is done before
        (tmp_path / "out").rename(first)
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".outer.tmp-1", "out"]


def test_parents_are_made_and_the_name_may_end_in_a_slash(tmp_path):
    with published(tmp_path / "a" / "b" / "", 0) as directory:
        (directory / "file").write_text("x")
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
