"""A replica whose ranks are spread over two nodes."""

import pytest

from tests.cluster.conftest import figures_of_program


@pytest.mark.slow
def test_a_group_over_two_nodes_generates_the_same_and_outlives_one() -> None:
    figures = figures_of_program("tests.cluster.two_nodes")
    assert figures["num_nodes"] == 2
    assert figures["difference"] <= 1
    assert figures["again"]
