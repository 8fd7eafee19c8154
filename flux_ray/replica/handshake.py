"""How a leader and a rank believe each other, over a socket to which anybody may have connected.

Both know a token, which is never said: each proves that it knows it, of two numbers that are used
once, so that whoever listens can neither learn it nor say the same again. Rank: a number. Leader:
another one and its proof. Rank: its own proof. Nothing else is read or sent before.
"""

import asyncio
import hmac
import secrets
import socket
import time
from contextlib import suppress

TOKEN_BYTES = 32
NUMBER_BYTES = 32
PROOF_BYTES = 32
# What a proof is made of besides: that of one end is none of the other's.
LEADER, RANK = b"flux-ray leader", b"flux-ray rank"


class Impostor(ConnectionError):
    """Who answers does not know the token."""


def proof_of(speaker: bytes, token: bytes, rank_number: bytes, leader_number: bytes) -> bytes:
    """What only who knows the token can say, and only in this meeting."""
    return hmac.digest(token, speaker + rank_number + leader_number, "sha256")


def is_leader(connection: socket.socket, token: bytes, patience_s: float) -> bool:
    """Say whether the leader has connected, and prove to it that this is its rank. Blocks.

    False for whoever is too slow or has left, too.
    """
    number = secrets.token_bytes(NUMBER_BYTES)
    end_s = time.monotonic() + patience_s
    try:
        connection.settimeout(patience_s)
        connection.sendall(number)
        said = received(connection, NUMBER_BYTES + PROOF_BYTES, end_s)
        leader_number, proof = said[:NUMBER_BYTES], said[NUMBER_BYTES:]
        if not hmac.compare_digest(proof, proof_of(LEADER, token, number, leader_number)):
            return False
        connection.sendall(proof_of(RANK, token, number, leader_number))
        connection.settimeout(None)
    except OSError:
        return False
    return True


def received(connection: socket.socket, num_bytes: int, end_s: float) -> bytes:
    """So many bytes; fewer where they do not come by then, however slowly some do."""
    said = b""
    with suppress(TimeoutError):
        while len(said) < num_bytes and (left_s := end_s - time.monotonic()) > 0:
            connection.settimeout(left_s)
            more = connection.recv(num_bytes - len(said))
            if not more:
                break
            said += more
    return said


async def meet_rank(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes
) -> None:
    """Prove to a rank that this is its leader. Raises Impostor if it is no rank of this leader's.

    EOFError if it hangs up.
    """
    rank_number = await reader.readexactly(NUMBER_BYTES)
    number = secrets.token_bytes(NUMBER_BYTES)
    writer.write(number + proof_of(LEADER, token, rank_number, number))
    proof = await reader.readexactly(PROOF_BYTES)
    if not hmac.compare_digest(proof, proof_of(RANK, token, rank_number, number)):
        raise Impostor("who answers for the rank does not know its token")
