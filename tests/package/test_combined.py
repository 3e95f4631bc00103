"""What README.md says of losses and options together is so, cell by cell."""

from __future__ import annotations

import combined_cases as cases
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
CELLS = cases.cells()


def test_the_table_is_complete() -> None:
    columns = [*cases.COLUMNS, cases.SHARDED]
    places = {(loss, column) for loss, column, _ in CELLS}
    assert places == {(loss, column) for loss in cases.KINDS for column in columns}
    assert len(places) == len(CELLS)


@pytest.mark.parametrize(
    ("loss", "column", "goes"),
    [cell for cell in CELLS if cell[1] != cases.SHARDED],
    ids=lambda part: str(part).strip("`"),
)
def test_cell(loss: str, column: str, goes: bool) -> None:
    kind, check = cases.KINDS[loss], cases.COLUMNS[column]
    if goes:
        check(kind)
        return
    with pytest.raises((TypeError, ValueError)):
        check(kind)
