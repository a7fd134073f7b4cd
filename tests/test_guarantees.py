"""The page of guarantees is that of the record, whose rows have tests that exist; and a run under drawn faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chaos, guarantees
from tests.guarantees import PAGE, ROOT, ROWS


def test_the_pages_table_is_that_of_the_record() -> None:
    outcomes = guarantees.record()
    assert list(outcomes) == [row.fault for row in ROWS]
    assert guarantees.block(PAGE.read_text()) == guarantees.table(outcomes)
    assert not any("failure" in outcome or "error" in outcome for outcome in outcomes.values())


@pytest.mark.parametrize("test", [test for row in ROWS for test in row.tests])
def test_each_row_has_its_tests(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text() if name else (ROOT / "tests" / file).exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_under_drawn_faults_ends_as_promised(tmp_path: Path) -> None:
    assert chaos.main(["--seed", "0", "--only", "0", "--folder", str(tmp_path)]) == 0
