"""Colour profiles made here, so that no file has to be kept."""

import struct


def profile(
    primaries: dict[str, tuple[float, float, float]], gamma: float, space: bytes = b"RGB "
) -> bytes:
    """An ICC profile of a display: its primaries in XYZ (D50), and one gamma for all channels."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    words = b"own"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 4) + words + bytes(1 + 78),
        b"cprt": b"text" + bytes(4) + words + bytes(1),
        b"wtpt": b"XYZ " + bytes(4) + b"".join(map(number, (0.9642, 1.0, 0.8249))),
    }
    for channel, xyz in primaries.items():
        tags[channel.encode() + b"XYZ"] = b"XYZ " + bytes(4) + b"".join(map(number, xyz))
    for channel in primaries or ("k",):
        tags[channel.encode() + b"TRC"] = curve
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28)
    head += b"".join(map(number, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# The primaries of Adobe RGB (1998), and of sRGB, adapted to D50.
ADOBE = profile(
    {
        "r": (0.60974, 0.31111, 0.01947),
        "g": (0.20528, 0.62567, 0.06087),
        "b": (0.14919, 0.06322, 0.74457),
    },
    563 / 256,
)
NEARLY_SRGB = profile(
    {
        "r": (0.43607, 0.22249, 0.01392),
        "g": (0.38515, 0.71687, 0.09708),
        "b": (0.14307, 0.06061, 0.71410),
    },
    2.2,
)
GREY = profile({}, 1.0, b"GRAY")
