"""A card is known by what CUDA calls it and by its memory."""

import pytest

from flux_ray.catalog.gpus import CARDS, GIB, card_of


@pytest.mark.parametrize(
    ("device", "gib", "expected"),
    [
        ("NVIDIA B200", 178.4, "b200-180gb"),
        ("NVIDIA H200", 139.8, "h200-141gb"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80gb"),
        ("NVIDIA H100 PCIe", 79.2, "h100-80gb"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40gb"),
        ("NVIDIA L40S", 44.4, "l40s-48gb"),
        ("NVIDIA L4", 22.05, "l4-24gb"),
        ("NVIDIA A10G", 22.1, "a10g-24gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 5090", 31.4, "rtx5090-32gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.5, None),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA A10", 22.1, None),
        ("Tesla T4", 14.6, None),
        ("", 0, None),
    ],
)
def test_a_device_is_its_row_or_none(device: str, gib: float, expected: str | None) -> None:
    assert card_of(device, int(gib * GIB)) == expected


def test_no_two_rows_are_one_device() -> None:
    for name, card in CARDS.items():
        chip = name.split("-")[0].upper().replace("RTX", "GeForce RTX ")
        assert card_of(f"NVIDIA {chip}", card.usable_bytes) == name
