"""Replicas that are spread over two nodes, and a replica whose ranks are."""

import pytest

from tests.cluster.conftest import figures_of_program


@pytest.mark.slow
def test_replicas_are_spread_and_a_group_over_two_nodes_outlives_one() -> None:
    figures = figures_of_program("tests.cluster.two_nodes")
    assert figures["num_nodes_of_replicas"] == figures["num_nodes_of_ranks"] == 2
    assert figures["difference"] <= 1
    assert figures["again"]
