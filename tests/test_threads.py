"""How many threads compute: what affinity and control groups allow, and the same again when a run goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunewright.engine import distributed
from tunewright.engine.distributed import _allowance, choose_threads


def group(root: Path, inner: str, outer: str) -> tuple[Path, Path]:
    """A tree of control groups: /a/b with these limits of b and a."""
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "cpu.max").write_text(outer)
    (root / "a" / "b" / "cpu.max").write_text(inner)
    own = root / "own"
    own.write_text("0::/a/b\n")
    return root, own


@pytest.mark.parametrize(
    ("inner", "outer", "cores"),
    [("max 100000", "max 100000", None), ("150000 100000", "max 100000", 1.5), ("400000 100000", "50000 100000", 0.5)],
)
def test_the_tightest_group_counts(tmp_path, inner, outer, cores):
    assert _allowance(*group(tmp_path, inner, outer)) == cores


def test_the_first_version_of_groups_is_read_too(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert _allowance(tmp_path, tmp_path / "none") == 3.0
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert _allowance(tmp_path, tmp_path / "none") is None


def test_no_groups_no_limit(tmp_path):
    assert _allowance(tmp_path / "no", tmp_path / "none") is None


def test_threads_never_exceed_what_is_allowed_and_a_resumed_run_keeps_its_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for allowed, wanted in ((None, 8), (2.5, 2), (0.5, 1), (16.0, 8)):
        monkeypatch.setattr(distributed, "_allowance", lambda allowed=allowed: allowed)
        assert choose_threads()[0] == wanted
        assert ("container" in choose_threads()[1]) == (wanted != 8)
        assert choose_threads(5)[0] == 5
