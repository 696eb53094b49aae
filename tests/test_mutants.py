"""The faults of `tests.mutants` still name one place each; the faults themselves are tried by `make mutants`."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.module}: {m.line.strip()[:30]}")
def test_the_line_is_there_once_and_its_tests_exist(mutant):
    assert mutant.source.count(mutant.line) == 1
    compile(mutant.source.replace(mutant.line, mutant.fault), mutant.module, "exec")
    assert all((ROOT / word).exists() for word in mutant.tests.split() if word.startswith("tests/"))


def test_there_are_forty_of_all_subjects():
    assert len(MUTANTS) == 40
    subjects = {mutant.subject for mutant in MUTANTS}
    assert subjects >= {
        "plan",
        "optimizer groups",
        "layers",
        "stages",
        "DDP",
        "resuming",
        "losses",
        "adapters",
        "hub",
        "data",
    }
