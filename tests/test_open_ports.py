"""What of ours listens, and where: nothing on all interfaces; docs/security.md has all of it."""

import ast
import re
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from flux_ray.config.tier import Parallel, TierArgs
from flux_ray.parallel.mesh import Mesh, open_store
from flux_ray.replica.rank import RankActor
from flux_ray.replica.transport import RankServer
from tests.ranks import Ranks
from tests.test_house import PACKAGE, ROOT, SOURCES

# What makes a socket listen, or a library of ours or of torch's.
LISTENS = {
    *("bind", "listen", "create_server", "start_server", "start_unix_server", "serve_forever"),
    *("HTTPServer", "TCPServer", "TCPStore", "Listener", "init_process_group", "init_rpc"),
    *("add_insecure_port", "add_secure_port", "start_http_server"),
}
KNOWN = {
    # Of Serve's applications, of SQLAlchemy's events and of the ledger's decisions: no sockets.
    "app.py": {"bind"},
    "jobs/database.py": {"listen"},
    "router/ledger/client.py": {"listen"},
    # Of who trains the embedded model anew, on one machine; nobody serves meanwhile.
    "tiny/train_transformer.py": {"init_process_group"},
    "parallel/mesh.py": {"TCPStore", "create_server", "init_process_group"},
    "replica/transport.py": {"create_server"},
}
ANY_ADDRESS = re.compile(r"[\"'](0\.0\.0\.0|::|\*)[\"']|\(\(\"\",")


def calls_of(path: Path) -> set[str]:
    """The last names of all that is called in a file."""
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if is_call(node))
    return {getattr(each, "attr", getattr(each, "id", "")) for each in calls}


def is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call)


def test_who_listens_is_known():
    """A new one belongs into docs/security.md's table, and is to be bound to one address."""
    found = {
        str(path.relative_to(PACKAGE)): calls
        for path in SOURCES
        if (calls := calls_of(path) & LISTENS)
    }
    assert found == KNOWN


@pytest.mark.parametrize("name", ["parallel/mesh.py", "replica/transport.py", "replica/rank.py"])
def test_no_address_of_ours_is_that_of_all_interfaces(name):
    assert ANY_ADDRESS.findall((PACKAGE / name).read_text()) == []


def test_the_docs_say_who_listens():
    page = (ROOT / "docs" / "security.md").read_text()
    section = page.partition("## Ports\n")[2].partition("\n## ")[0]
    for name in ("rendezvous", "gloo", "NCCL", "proxy", "gRPC", "metrics", "dashboard", "GCS"):
        assert name in section, name


def listeners() -> set[str]:
    """The addresses at which this process listens."""
    connections = psutil.Process().net_connections("tcp")
    return {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}


def ports_at(host: str) -> set[int]:
    connections = psutil.Process().net_connections("tcp")
    return {
        each.laddr.port
        for each in connections
        if each.status == psutil.CONN_LISTEN and each.laddr.ip == host
    }


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_the_rendezvous_listens_at_the_address_that_it_is_given(host):
    before = listeners()
    store = open_store(host, 10)
    assert store.port in ports_at(host)
    assert listeners() - before <= {host}
    store.set("met", "yes")
    assert store.get("met") == b"yes"


def test_a_line_listens_at_the_address_that_it_is_given():
    extension = RankServer("127.0.0.1")
    assert extension.address.port in ports_at("127.0.0.1")
    extension._socket.close()


def test_one_rank_meets_nobody(monkeypatch):
    rank = RankActor.__new__(RankActor)
    rank._args = TierArgs(tier="tiny", device="cpu")
    before = listeners()
    assert rank.create_store() is None
    assert listeners() == before


def addresses(mesh: Mesh) -> set[str]:
    """Where a rank listens that has met the others, by gloo too."""
    assert dist.get_backend() == "gloo"
    return listeners()


@pytest.mark.parametrize("parallel", [Parallel(tensor=2), Parallel(tensor=2, sequence=2)])
def test_ranks_on_one_node_listen_on_loopback_only(run_ranks: Ranks, parallel: Parallel) -> None:
    for found in run_ranks(parallel, addresses):
        assert found <= {"127.0.0.1", "::1"}
