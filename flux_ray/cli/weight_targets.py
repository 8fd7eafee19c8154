"""Which weights the words of a command line mean, and whether their licence was accepted."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flux_ray.catalog import ALL_EMBEDDED, TIERS, Tier, tier_for
from flux_ray.cli.client import fail
from flux_ray.cli.config_file import tiers_in
from flux_ray.errors import UnknownTier
from flux_ray.weights.source import (
    HUB_ID,
    WeightSource,
    WeightsUnavailable,
    source_for,
    weights_of,
)

# Who may use the weights for anything need not be asked.
PERMISSIVE = ("apache-2.0", "mit")
RECORD = "flux-ray-licence.json"
CONFIG_ENDINGS = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Target:
    """Weights that a command is about, under the name of their tier."""

    name: str
    licence: str
    source: WeightSource

    @property
    def is_embedded(self) -> bool:
        """Return whether they are a part of this package."""
        return self.source in map(source_for, ALL_EMBEDDED)

    def folder(self, to: Path | None) -> Path | None:
        """Return the folder to pull into, or None for the hub's cache."""
        return None if to is None else to / self.name.replace("/", "--")

    def place(self, to: Path | None = None) -> Path:
        """Return where the files are, or would be."""
        from flux_ray.weights.hub import snapshot_of

        if self.source.revision is None:
            return Path(self.source.location)
        return snapshot_of(self.source, self.folder(to))

    def is_accepted(self, to: Path | None) -> bool:
        """Return whether the licence is permissive, or was accepted for the weights there."""
        if self.licence in PERMISSIVE:
            return True
        try:
            record = json.loads(self._record(to).read_text())
        except (OSError, ValueError):
            return False
        return isinstance(record, dict) and record.get("licence") == self.licence

    def accept(self, to: Path | None) -> None:
        """Write down beside the weights that their licence is accepted, and when."""
        path = self._record(to)
        path.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"licence": self.licence, "weights": str(self.source), "accepted": now}
        path.write_text(json.dumps(record, indent=1) + "\n")

    def _record(self, to: Path | None) -> Path:
        from flux_ray.weights.hub import storage_of

        return (self.folder(to) or storage_of(self.source)) / RECORD


def targets_of(words: list[str]) -> list[Target]:
    """Return the weights that the words name, each once; end the command if a word names none."""
    found: dict[str, Target] = {}
    for word in words:
        for target in targets_in(word):
            found.setdefault(f"{target.name} {target.source}", target)
    return list(found.values())


def targets_in(word: str) -> list[Target]:
    """Return the weights of one word: a config file's tiers, a hub id's, or a tier's published."""
    if word.endswith(CONFIG_ENDINGS):
        if not Path(word).is_file():
            fail(f"there is no config file {word}")
        return [
            target_for(tier_for(args.tier), weights_of(tier_for(args.tier), args.weights))
            for args in tiers_in(Path(word))
        ]
    if HUB_ID.fullmatch(word):
        tier = next((tier for tier in TIERS if tier.hub_id == word), None)
        return [target_for(tier, word)]
    try:
        tier = tier_for(word)
    except UnknownTier as error:
        fail(f"{error}; a config file ends in {', '.join(CONFIG_ENDINGS)}")
    if not (published := tier.weights or tier.hub_id):
        fail(
            f"the weights of {word} are not published: they come from whoever licenses them to you"
        )
    return [target_for(tier, published)]


def target_for(tier: Tier | None, named: str) -> Target:
    """Return the target of what a tier or a config names; end the command if it is not there."""
    try:
        source = source_for(named)
    except WeightsUnavailable as error:
        fail(f"tier {tier.name}: {error}" if tier else str(error))
    if tier is None:
        return Target(source.location, "of the repository", source)
    return Target(tier.name, tier.license, source)


def folders_of(words: list[str]) -> list[Target]:
    """Return the targets to verify; a word may be a folder, and embedded weights are one too."""
    folders = [word for word in words if Path(word).is_dir()]
    others = [word for word in words if word not in folders]
    return [
        *(Target(folder, "of the folder", WeightSource(folder)) for folder in folders),
        *targets_of(others),
    ]
