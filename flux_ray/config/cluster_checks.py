"""Check a config file against the nodes of a cluster: room, labels, and jobs that nodes share.

Serve takes a file for which its cluster has no room, and waits for nodes that may never come, so
`deploy` asks first. Each finding is one sentence that names the key and says what to do.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flux_ray.config.checks import Finding, NamedArgs, gateways_among, tiers_among
from flux_ray.config.gateway import GatewayArgs
from flux_ray.config.tier import Args, TierArgs

# Ray counts processors to so many digits.
CPU_DIGITS = 4


@dataclass(frozen=True)
class ClusterNode:
    """A node that is alive; `accelerator` is Ray's word for its GPUs, such as `H100`."""

    ip: str
    num_cpus: float
    num_gpus: int
    accelerator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def has(self, node_labels: Mapping[str, str]) -> bool:
        """Return whether Ray's label selectors choose the node: `a`, `!a`, `in(a, b)`, `!in(a)`."""
        for key, selector in node_labels.items():
            values = re.split(", ?", selector.removeprefix("!").removeprefix("in(").rstrip(")"))
            if (self.labels.get(key) in values) == selector.startswith("!"):
                return False
        return True


def check_room(
    applications: Sequence[NamedArgs], nodes: Sequence[ClusterNode], *, may_grow: bool = False
) -> Iterator[Finding]:
    """Find applications that have no place on the nodes, one by one or all together.

    `may_grow`: nodes are added on demand, so that what lacks now is only a warning.
    """
    # On nodes with labels only what asks for them counts, as the rest may be elsewhere; on all
    # nodes everything does.
    pools: dict[str, dict[str, str]] = {"": {}}
    pools |= {words(labels): labels for labels in map(labels_of, applications)}
    for name, labels in pools.items():
        inside = [each for each in applications if labels_of(each) == labels]
        chosen = [node for node in nodes if node.has(labels)]
        if labels and not chosen:
            texts = [
                f"application {each.name}: args.node_labels: no node has {name}; correct it, or"
                " start such nodes (`ray start --labels`)"
                for each in inside
            ]
        else:
            everybody = inside if labels else applications
            texts = [*too_large(inside, chosen), *too_many(everybody, chosen, name)]
        yield from (Finding(text, is_warning=may_grow) for text in texts)


def labels_of(application: NamedArgs) -> dict[str, str]:
    """Return the labels of the nodes that an application asks for; none if it may be anywhere."""
    args = application.args
    return args.node_labels if isinstance(args, TierArgs) else {}


def words(node_labels: Mapping[str, str]) -> str:
    """Return label selectors as a file has them, such as `pool: whole`."""
    return ", ".join(f"{key}: {selector}" for key, selector in sorted(node_labels.items()))


def too_large(applications: Sequence[NamedArgs], nodes: Sequence[ClusterNode]) -> Iterator[str]:
    """Find tiers one replica of which has no place, even if it had the nodes for itself."""
    gpus, cpus = [float(node.num_gpus) for node in nodes], [node.num_cpus for node in nodes]
    for tier in tiers_among(applications):
        args, num_nodes = tier.args, tier.args.parallel.num_nodes
        place = "one node" if num_nodes == 1 else f"at most {num_nodes} nodes"
        other = "no node has" if num_nodes == 1 else f"no {num_nodes} nodes have"
        num_cpus = args.parallel.num_ranks * args.num_cpus
        for key, unit, size, offered in (
            ("parallel", "GPUs", args.num_gpus_per_replica, gpus),
            ("num_cpus", "CPUs", num_cpus, cpus),
        ):
            largest = sum(sorted(offered)[-num_nodes:])
            if size > largest:
                yield (
                    f"application {args.tier}: args.{key}: one replica takes {size:g} {unit} of"
                    f" {place}, and {other} more than {largest:g}; make it smaller, or add such"
                    " nodes"
                )


def too_many(
    applications: Sequence[NamedArgs], nodes: Sequence[ClusterNode], node_labels: str
) -> Iterator[str]:
    """Find that all replicas together have no place on the nodes, which have those labels."""
    gpus = {tier.name: float(least_gpus(tier.args)) for tier in tiers_among(applications)}
    cpus = {each.name: least_cpus(each.args) for each in applications}
    for key, unit, needed, total in (
        ("num_replicas", "GPUs", gpus, sum(node.num_gpus for node in nodes)),
        ("num_cpus", "CPUs", cpus, sum(node.num_cpus for node in nodes)),
    ):
        number = round(sum(needed.values()), CPU_DIGITS)
        if number > total:
            parts = ", ".join(f"{name} {taken:g}" for name, taken in needed.items() if taken)
            who = f"nodes with {node_labels} have" if node_labels else "the cluster has"
            yield (
                f"args.{key}: {number:g} {unit} are needed ({parts}), and {who} {total:g};"
                f" lower {key}, or add nodes"
            )


def least_replicas(args: TierArgs) -> int:
    """Return the replicas that a tier has at least."""
    return args.num_replicas if args.autoscaling is None else args.autoscaling.min_replicas


def least_gpus(args: TierArgs) -> int:
    """Return the GPUs that a tier takes at least: its replicas, and a text encoder they share."""
    if args.device != "cuda":
        return 0
    return least_replicas(args) * args.num_gpus_per_replica + (args.text_encoder == "shared")


def least_cpus(args: Args | None) -> float:
    """Return the CPUs that an application takes at least, as `flux_ray/app.py` asks for them."""
    if isinstance(args, GatewayArgs):
        return args.num_replicas * args.num_cpus
    if isinstance(args, TierArgs):
        num_ranks = least_replicas(args) * args.parallel.num_ranks
        return (num_ranks + (args.text_encoder == "shared")) * args.num_cpus
    return 0.0


def check_jobs(
    applications: Sequence[NamedArgs], nodes: Sequence[ClusterNode], *, may_grow: bool = False
) -> Iterator[Finding]:
    """Find jobs or results that each machine would have for itself, if gateways may be on several.

    `may_grow`: machines may join later; as long as there is one only, this is a warning.
    """
    # Nodes of one address share its files. Gateways ask for processors.
    are_several = len({node.ip for node in nodes if node.num_cpus}) > 1
    for gateway in gateways_among(applications) if are_several or may_grow else ():
        jobs = gateway.args.jobs
        wrong: dict[str, tuple[str, str]] = {}
        if jobs is not None and jobs.database.startswith("sqlite:"):
            wrong["database"] = jobs.database, "postgresql://..."
        if jobs is not None and "://" not in jobs.results:
            better = "s3://..., or file:///... for a folder that all machines mount"
            wrong["results"] = jobs.results, better
        for key, (value, better) in wrong.items():
            yield Finding(
                f"application {gateway.name}: args.jobs.{key}: {value} is of one machine, and"
                f" gateways on others would not find what is kept there; say {better}",
                is_warning=not are_several,
            )
