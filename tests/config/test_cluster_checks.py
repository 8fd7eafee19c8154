"""What a file needs and the nodes of a cluster lack: GPUs, CPUs, labels, jobs that they share."""

from typing import Any

import pytest

from flux_ray.config import NamedArgs
from flux_ray.config.cluster_checks import ClusterNode, check_jobs, check_room
from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import TierArgs

URL = "https://flux.example.com"
POSTGRES = "postgresql://flux@db/flux"
HEAD = ClusterNode("10.0.0.1", 0, 0)


def tier(name: str = "flux-2-klein-4b", **args: Any) -> NamedArgs:
    args = {"tier": name, "weights": "owner/name@revision"} | args
    return NamedArgs(name, None, TierArgs.model_validate(args))


def gateway(**args: Any) -> NamedArgs:
    args = {"tiers": ["flux-2-klein-4b"], "public_url": URL} | args
    return NamedArgs("gateway", "/", GatewayArgs.model_validate(args))


def nodes_of(*gpus: int, num_cpus: float = 64, **labels: str) -> list[ClusterNode]:
    """Return nodes with so many GPUs each."""
    return [
        ClusterNode(f"10.0.1.{number}", num_cpus, num_gpus, labels=labels)
        for number, num_gpus in enumerate(gpus)
    ]


def texts(*found: Any) -> list[str]:
    assert not any(each.is_warning for each in found)
    return [each.text for each in found]


@pytest.mark.parametrize(
    ("tiers", "gpus", "said"),
    [
        ([tier(num_replicas=2)], [1, 1], []),
        (
            [tier(num_replicas=3)],
            [1, 1],
            ["3 GPUs are needed (flux-2-klein-4b 3), and"],
        ),
        ([tier(text_encoder="shared")], [1], ["2 GPUs are needed"]),
        ([tier(parallel={"tensor": 2})], [1, 1], ["one replica takes 2 GPUs of one node"]),
        ([tier(parallel={"tensor": 2, "num_nodes": 2})], [1, 1], []),
        (
            [tier("flux-2-dev", parallel={"tensor": 4, "sequence": 4, "num_nodes": 2})],
            [4, 8, 4],
            ["one replica takes 16 GPUs of at most 2 nodes, and no 2 nodes have more than 12;"],
        ),
        ([tier("flux-2-dev", parallel={"tensor": 4, "sequence": 3, "num_nodes": 2})], [4, 8], []),
        ([tier(device="cpu", num_replicas=9)], [0], []),
        (
            [tier(num_replicas=9, autoscaling={"min_replicas": 1, "max_replicas": 9})],
            [1],
            [],
        ),
        (
            [tier(), tier("flux-2-dev", parallel={"tensor": 2})],
            [0],
            ["takes 1 GPUs", "takes 2 GPUs", "(flux-2-klein-4b 1, flux-2-dev 2), and the cluster"],
        ),
    ],
)
def test_more_gpus_than_there_are(tiers: list[NamedArgs], gpus: list[int], said: list[str]) -> None:
    nodes = [HEAD, *nodes_of(*gpus)]
    found = texts(*check_room(tiers, nodes))
    assert len(found) == len(said)
    assert all(words in text for words, text in zip(said, found, strict=True))
    assert all(each.is_warning for each in check_room(tiers, nodes, may_grow=True))


# Two groups of two ranks, a text encoder and two gateways.
CPUS = [
    gateway(num_replicas=2, num_cpus=1.5),
    tier(num_replicas=2, num_cpus=4, parallel={"tensor": 2}, text_encoder="shared"),
]


@pytest.mark.parametrize(
    ("num_cpus", "said"),
    [
        (11.5, None),
        (
            11.4,
            "args.num_cpus: 23 CPUs are needed (gateway 3, flux-2-klein-4b 20), and the cluster has"
            " 22.8; lower num_cpus, or add nodes",
        ),
    ],
)
def test_more_cpus_than_there_are(num_cpus: float, said: str | None) -> None:
    found = texts(*check_room(CPUS, nodes_of(3, 3, num_cpus=num_cpus)))
    assert found == ([] if said is None else [said])


def test_cpus_of_one_replica_are_of_one_node() -> None:
    (said,) = texts(*check_room(CPUS, nodes_of(*[3] * 8, num_cpus=7)))
    assert "args.num_cpus: one replica takes 8 CPUs of one node, and no node has more than" in said


def test_cpus_are_counted_as_ray_counts_them() -> None:
    """In floats, three times 0.1 is more than 0.3."""
    assert texts(*check_room([gateway(num_replicas=3)], nodes_of(0, num_cpus=0.3))) == []


@pytest.mark.parametrize(
    ("selector", "is_found"),
    [
        ("whole", True),
        ("whoel", False),
        ("!whole", False),
        ("!other", True),
        ("in(half, whole)", True),
        ("in(half,quarter)", False),
        ("!in(half, whole)", False),
    ],
)
def test_labels_that_no_node_has(selector: str, is_found: bool) -> None:
    tiers = [tier(node_labels={"pool": selector})]
    found = texts(*check_room(tiers, nodes_of(8, pool="whole")))
    wrong = f"application flux-2-klein-4b: args.node_labels: no node has pool: {selector}; correct"
    assert [text.startswith(wrong) for text in found] == ([] if is_found else [True])


def test_a_node_without_labels_is_none_that_is_excluded() -> None:
    assert texts(*check_room([tier(node_labels={"pool": "!whole"})], nodes_of(1))) == []


def test_what_asks_for_labels_has_room_on_these_nodes_only() -> None:
    labels = {"pool": "whole"}
    tiers = [tier("flux-2-dev", node_labels=labels, parallel={"tensor": 4}), tier(num_replicas=8)]
    nodes = [*nodes_of(2, **labels), *nodes_of(8)]
    large, many, all_of_them = sorted(texts(*check_room(tiers, nodes)))
    assert "one replica takes 4 GPUs of one node, and no node has more than 2" in large
    assert "4 GPUs are needed (flux-2-dev 4), and nodes with pool: whole have 2" in all_of_them
    assert "12 GPUs are needed (flux-2-dev 4, flux-2-klein-4b 8)" in many


@pytest.mark.parametrize(
    ("jobs", "keys"),
    [
        (None, []),
        ({}, ["database", "results"]),
        ({"database": POSTGRES}, ["results"]),
        ({"results": "s3://flux-results"}, ["database"]),
        ({"database": POSTGRES, "results": "file:///shared/results"}, []),
    ],
)
def test_jobs_that_each_machine_would_have_for_itself(
    jobs: dict[str, str] | None, keys: list[str]
) -> None:
    applications = [gateway(jobs=jobs), tier()]
    one, two = nodes_of(1), nodes_of(1, 1)
    assert list(check_jobs(applications, [HEAD, *one])) == []
    # Nodes of one machine.
    assert list(check_jobs(applications, one * 2)) == []
    said = texts(*check_jobs(applications, two))
    begins = [text.split(": ")[:2] for text in said]
    assert begins == [["application gateway", f"args.jobs.{key}"] for key in keys]
    warned = list(check_jobs(applications, one, may_grow=True))
    assert [each.text for each in warned] == said
    assert all(each.is_warning for each in warned)
    assert texts(*check_jobs(applications, two, may_grow=True)) == said
