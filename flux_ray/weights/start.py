"""Have a tier's weights on this machine before its ranks start, or say in seconds why not.

The leader of a replica, each rank and a shared text encoder call this first. What it raises is what
`serve status` shows last, so that it names the tier, the weights and the command that helps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flux_ray.catalog import ALL_EMBEDDED, Tier, tier_for
from flux_ray.config import TierArgs
from flux_ray.weights.shards import check_parallel, read_manifest
from flux_ray.weights.source import (
    CONFIGS,
    HUB_ID,
    IMAGE_PARTS,
    INDEXES,
    PROMPT_PARTS,
    WeightSource,
    WeightsUnavailable,
    source_for,
    weights_of,
)

# What the processes of a tier read: a shared text encoder only the last of these.
RANK_PARTS = (*CONFIGS, *IMAGE_PARTS)
ENCODER_PARTS = (*CONFIGS, *PROMPT_PARTS)


def parts_of_ranks(args: TierArgs) -> tuple[str, ...]:
    """Return the patterns of the files that a replica's ranks read."""
    return RANK_PARTS if args.text_encoder == "shared" else (*RANK_PARTS, *PROMPT_PARTS)


def prepare_weights(args: TierArgs, parts: tuple[str, ...]) -> None:
    """Download what of the tier's weights is not on this machine; raise WeightsUnavailable.

    If all is here it only looks at names. Else it first makes sure that the download can succeed:
    its error comes in seconds. One process of the machine downloads, the others wait for it.
    """
    with said_of_tier(args) as source:
        if source.revision is not None:
            # Only here: every process of the cluster imports this file, and few ask the hub.
            from flux_ray.weights.download import fetch

            fetch(source, parts)


def missing_bytes(args: TierArgs, parts: tuple[str, ...]) -> int:
    """Return how many bytes `prepare_weights` would download; raise as it would."""
    with said_of_tier(args) as source:
        if source.revision is None:
            return 0
        from flux_ray.weights.download import plan_fetch

        plan = plan_fetch(source, parts)
        return 0 if plan is None else plan.num_missing_bytes


@contextmanager
def said_of_tier(args: TierArgs) -> Iterator[WeightSource]:
    """Yield the source of a tier's weights; name tier and remedy in each WeightsUnavailable."""
    tier = tier_for(args.tier)
    weights = weights_of(tier, args.weights)
    try:
        check_there(tier, weights, args)
        yield source_for(weights)
    except WeightsUnavailable as error:
        raise type(error)(f"tier {tier.name}: {error}{then_pull(tier, weights)}") from None


def check_there(tier: Tier, weights: str, args: TierArgs) -> None:
    """Raise WeightsUnavailable if a folder is missing, is no checkpoint, or is split otherwise."""
    folder = Path(weights)
    if weights in ALL_EMBEDDED or (HUB_ID.fullmatch(weights) and not folder.is_dir()):
        return
    if not folder.is_dir() and folder.is_absolute():
        raise WeightsUnavailable(
            f"this machine has no folder {weights}: mount it or copy it here{or_pull(tier)}"
        )
    # What is neither a folder nor a hub id is refused here.
    source_for(weights)
    if not any((folder / name).is_file() for name in INDEXES):
        raise WeightsUnavailable(
            f"the folder {folder} has no {' or '.join(INDEXES)}, so it is no checkpoint in the"
            f" layout of diffusers: name another one{or_pull(tier)}"
        )
    manifest = read_manifest(folder)
    if manifest is not None:
        check_parallel(folder, manifest, args)


def or_pull(tier: Tier) -> str:
    """Return how to get the tier's published weights into a folder; empty if there are none."""
    if tier.hub_id is None:
        return ""
    return f", or make it with `flux-ray weights pull {tier.name} --to FOLDER`"


def then_pull(tier: Tier, weights: str) -> str:
    """Return the end of an error about a hub id: the command that tries it without a cluster."""
    match = HUB_ID.fullmatch(weights)
    if match is None:
        return ""
    source = WeightSource(match["repository"], match["revision"])
    return f"; then run `{pull_command(tier, source)}` on each node"


def pull_command(tier: Tier, source: WeightSource) -> str:
    """Return the command that downloads these weights."""
    return f"flux-ray weights pull {tier.name if str(source) == tier.hub_id else source}"


def too_slow(args: TierArgs, parts: tuple[str, ...]) -> str:
    """Say why a replica did not load in time: it still downloads, or it only loads slowly."""
    tier = tier_for(args.tier)
    source = source_for(weights_of(tier, args.weights))
    limit = f"within load_timeout_s {args.load_timeout_s:g}"
    if source.revision is not None:
        from flux_ray.weights.hub import is_complete

        if not is_complete(source, parts):
            return (
                f"tier {tier.name} did not download {source} {limit}: raise it, or run"
                f" `{pull_command(tier, source)}` on each node before"
            )
    return f"tier {tier.name} did not load its weights {limit}: raise it"
