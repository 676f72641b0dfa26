"""The table of `make mutants` fits the sources; whether tests notice its mutants is for it to find."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
PLACES = ("csrc/cpu", "csrc/cuda", "csrc/rules", "csrc/host", "triton_kernels", "python/danlu", "bench")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(TESTS / "mutants")
    return runpy.run_path(str(TESTS / "mutants"), run_name="mutants")


def test_each_old_text_is_once_in_its_file(program: dict[str, Any]) -> None:
    found = [text for mutant in program["MUTANTS"] if (text := program["why_not"](mutant, TESTS.parent))]
    assert not found, "\n".join(found)


def test_mutants_are_everywhere(program: dict[str, Any]) -> None:
    mutants = program["MUTANTS"]
    assert len({mutant.name for mutant in mutants}) == len(mutants) >= 40
    assert all(any(mutant.file.startswith(place) for mutant in mutants) for place in PLACES)
    assert all((TESTS.parent / mutant.tests[0]).exists() for mutant in mutants)
    assert all(mutant.old != mutant.new for mutant in mutants)


def test_a_text_that_is_gone_or_there_twice_is_an_error(program: dict[str, Any], tmp_path: Path) -> None:
    mutant = dataclasses.replace(program["MUTANTS"][0], file="code", old="a")
    for text, times in (("b", 0), ("aba", 2)):
        (tmp_path / "code").write_text(text)
        assert f"{times} times" in program["why_not"](mutant, tmp_path)
    assert "0 times" in program["why_not"](mutant, tmp_path / "nowhere")
    (tmp_path / "code").write_text("bab")
    assert program["why_not"](mutant, tmp_path) is None
