"""Which number must be larger than which: the table of docs/operations.md, and what it is about.

The table says what has to hold, and the figures; the files and the code's defaults are held to it.
"""

import re
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest

from tests.deployment.cluster_files import CHART, ROOT, UNITS_OF_BYTES
from tests.deployment.known_numbers import Number, all_numbers

PAGE = ROOT / "docs" / "operations.md"
# Of what the Helm chart alone has.
OF_CHART = {"`rayClusterDeletionDelaySeconds`"}
# The one pair that may be equal: who is asked second takes all that who is asked first does.
MAY_BE_EQUAL = ("`limits.max_body_bytes`", "their limit of a body")


@dataclass(frozen=True)
class Told:
    """One cell of the table: a name, and the least and the largest figure that it tells."""

    name: str
    least: float
    largest: float


@cache
def numbers() -> dict[str, list[Number]]:
    found: dict[str, list[Number]] = {}
    for number in all_numbers():
        found.setdefault(number.name, []).append(number)
    return found


def cell(text: str) -> Told:
    name, figures = text.strip().rsplit(": ", 1)
    found = re.fullmatch(r"([\d.]+)(?: to ([\d.]+))?(?: (s|[MG]iB))?", figures)
    assert found, f"no figures in {text!r}"
    factor = UNITS_OF_BYTES.get((found[3] or "").lower().removesuffix("b"), 1)
    least, largest = (float(each) * factor for each in (found[1], found[2] or found[1]))
    return Told(name, least, largest)


def rows() -> list[tuple[Told, Told]]:
    section = PAGE.read_text().split("## Which number must be larger than which\n")[1]
    table = section.split("\n## ")[0].split("| smaller | larger |")[1]
    lines = re.findall(r"^\| (.*) \| (.*) \| .* \|$", table, re.M)
    return [(cell(smaller), cell(larger)) for smaller, larger in lines]


ROWS = rows()
CELLS = sorted({each for row in ROWS for each in row}, key=lambda each: each.name)


def pairs(smaller: str, larger: str) -> list[tuple[Number, Number]]:
    """Return what is to be compared: what is of one place, or if nothing is, all with all."""
    both = list(product(numbers()[smaller], numbers()[larger]))
    return [each for each in both if each[0].place == each[1].place] or both


def skip_without_the_chart(name: str) -> None:
    if name in OF_CHART and not CHART.exists():
        pytest.skip("only the chart says it, and there is none")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].name} < {row[1].name}")
def test_the_smaller_number_is_smaller(row: tuple[Told, Told]) -> None:
    smaller, larger = (each.name for each in row)
    skip_without_the_chart(larger)
    for one, other in pairs(smaller, larger):
        if (smaller, larger) == MAY_BE_EQUAL:
            assert one.value <= other.value, (one, other)
        else:
            assert one.value < other.value, (one, other)


@pytest.mark.parametrize("told", CELLS, ids=lambda told: told.name)
def test_the_table_tells_the_true_figures(told: Told) -> None:
    skip_without_the_chart(told.name)
    values = [number.value for number in numbers()[told.name]]
    # Bytes are told to a tenth of a GiB.
    assert min(values) >= told.least * 0.98, numbers()[told.name]
    assert max(values) <= told.largest * 1.02, numbers()[told.name]
    if CHART.exists():
        assert min(values) == pytest.approx(told.least, rel=0.02)
        assert max(values) == pytest.approx(told.largest, rel=0.02)


def test_every_number_is_in_the_table() -> None:
    assert set(numbers()) == {told.name for told in CELLS} - (set() if CHART.exists() else OF_CHART)


def test_a_name_tells_the_same_figures_in_every_row() -> None:
    names = [told.name for told in CELLS]
    assert sorted(set(names)) == names
