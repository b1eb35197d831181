"""What we install: pinned, hashed, none that is known to be unsafe, and a changed archive is noticed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
spec = importlib.util.spec_from_file_location("archives", ROOT / ".ci" / "archives.py")
archives = importlib.util.module_from_spec(spec)
spec.loader.exec_module(archives)

# first release without the flaw: reading weights (torch), templates that leave their sandbox (jinja2),
# pictures that write past their buffer (pillow), tables that run code (pyarrow), loading a recipe (pyyaml)
SAFE_FROM = {
    "torch": ("2.10", "CVE-2026-24747"), "jinja2": ("3.1.6", "CVE-2025-27516"), "pillow": ("10.3", "CVE-2024-28219"),
    "pyarrow": ("14.0.1", "CVE-2023-47248"), "pyyaml": ("5.4", "CVE-2020-14343"),
}  # fmt: skip

NOT_FOR_TESTS = {"lm-eval"}  # brings twenty others; a stand-in plays its part


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]


def test_everything_that_is_installed_for_us_is_pinned_and_within_the_declared_range():
    pinned = pins()
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(pinned[name]), requirement
        if name in NOT_FOR_TESTS and importlib.util.find_spec(requirement.name) is None:
            continue
        installed = Version(importlib.metadata.version(name)).public
        assert requirement.specifier.contains(installed), requirement


def test_what_is_pinned_has_a_hash_and_nothing_else_has():
    listed = {}
    for file in archives.known():
        parse = parse_wheel_filename if file.endswith(".whl") else parse_sdist_filename
        listed[parse(file)[0]] = Version(parse(file)[1].public)
    assert listed == pins()


@pytest.mark.parametrize("name", SAFE_FROM)
def test_no_release_with_a_known_flaw_is_allowed(name):
    safe, advisory = SAFE_FROM[name]
    floors = [
        Version(part.version)
        for requirement in declared()
        if canonicalize_name(requirement.name) == name
        for part in requirement.specifier
        if part.operator == ">="
    ]
    assert floors, f"{name} has no lowest release"
    assert min(floors) >= Version(safe), advisory


def test_a_changed_archive_is_noticed_and_one_of_another_platform_is_said(tmp_path, capsys):
    name, digest = next(iter(archives.known().items()))

    def report(file: str, sha: str) -> Path:
        info = {"url": f"https://example.org/a/{file}", "archive_info": {"hashes": {"sha256": sha}}}
        folder = {"download_info": {"url": "file:///a", "dir_info": {"editable": True}}}
        (tmp_path / "report.json").write_text(json.dumps({"install": [{"download_info": info}, folder]}))
        return tmp_path / "report.json"

    assert archives.main([str(report(name, digest))]) == 0
    assert "1 as listed" in capsys.readouterr().out
    assert archives.main([str(report(name, "0" * 64))]) == 1
    assert re.search(f"{re.escape(name)}: SHA-256 0+, expected {digest}", capsys.readouterr().out)
    assert archives.main([str(report("other-1.0-py3-none-any.whl", digest))]) == 0
    assert "1 not listed (another platform or version): other-1.0-py3-none-any.whl" in capsys.readouterr().out
