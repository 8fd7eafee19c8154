"""Talk to the REST API of Ray's dashboard: what runs, on which nodes, and a new config.

This needs neither Ray nor a place in the cluster, only the dashboard's address and, if the cluster
has token authentication, its token. Whatever goes wrong is a DashboardError with one sentence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import typer

from flux_ray.config import ClusterNode, environment

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TOKEN_PATH = Path("~/.ray/auth_token")
# The dashboard answers a PUT only when it has started Serve, if nothing of it runs yet.
TIMEOUT = httpx.Timeout(120.0, connect=10.0)
LOCAL = {"localhost", "127.0.0.1", "::1"}

Address = Annotated[
    str,
    typer.Option(envvar="RAY_DASHBOARD_ADDRESS", help="Where Ray's dashboard answers."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="RAY_AUTH_TOKEN_PATH",
        dir_okay=False,
        help="The cluster's token; by default RAY_AUTH_TOKEN or ~/.ray/auth_token, as for Ray.",
        show_default=False,
    ),
]


class DashboardError(Exception):
    """The dashboard cannot be asked, or refused; the message is a sentence that says what to do."""


@dataclass(frozen=True)
class ClusterVersions:
    """The versions of Ray and Python on the head, and the name of its session."""

    ray: str
    python: str | None
    session: str


def is_local(address: str) -> bool:
    """Return whether an address is one of this machine."""
    return urlsplit(address).hostname in LOCAL


def find_token(token_file: Path | None, variables: Mapping[str, str], home: Path) -> str | None:
    """Return the token that Ray itself would send, or None if there is none.

    Ray looks at RAY_AUTH_TOKEN, then at the file of RAY_AUTH_TOKEN_PATH, then into the home folder.
    Raise DashboardError if a file that was named cannot be read.
    """
    if token := variables.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if token_file is not None:
        try:
            return token_file.read_text().strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise DashboardError(f"the token file {token_file} cannot be read: {error}") from None
    try:
        return (home / TOKEN_PATH.relative_to("~")).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


class Dashboard:
    """Calls to one dashboard. Closed by `with`; every method may raise DashboardError."""

    def __init__(
        self,
        address: str,
        token: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.address = address if "://" in address else f"http://{address}"
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._client = httpx.Client(
            base_url=self.address,
            headers=headers,
            timeout=TIMEOUT,
            transport=transport,
            # A proxy for the outside could not reach this machine.
            trust_env=not is_local(self.address),
        )

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def details(self) -> dict[str, Any]:
        """Return what Serve runs: applications, deployments, replicas, proxies, HTTP options."""
        details = self._object("/api/serve/applications/")
        return {"applications": {}, "proxies": {}} | details

    def put(self, config: Mapping[str, Any]) -> None:
        """Give Serve a config; applications that are not in it are removed."""
        response = self._send("PUT", "/api/serve/applications/", json=config)
        if response.status_code == 400:
            raise DashboardError(f"Serve refuses the config: {first_line(response.text)}")
        self._check(response)

    def nodes(self) -> list[ClusterNode]:
        """Return the nodes that are alive."""
        found = self._object("/api/v0/nodes")
        rows = found.get("data", {}).get("result", {}).get("result", [])
        return [node_of(row) for row in rows if row.get("state") == "ALIVE"]

    def versions(self) -> ClusterVersions:
        """Return the versions that the head runs."""
        version = self._object("/api/version")
        try:
            metadata = self._object("/api/v0/cluster_metadata").get("data", {})
        except DashboardError:
            # It is known some seconds after the start.
            metadata = {}
        return ClusterVersions(
            str(version.get("ray_version")),
            metadata.get("pythonVersion"),
            str(version.get("session_name")),
        )

    def metric_targets(self) -> list[str]:
        """Return `host:port` of all that Prometheus would scrape."""
        groups = self._json("/api/prometheus/sd")
        if not isinstance(groups, list):
            return []
        return [target for group in groups for target in group.get("targets", [])]

    def _object(self, path: str) -> dict[str, Any]:
        found = self._json(path)
        if not isinstance(found, dict):
            raise DashboardError(f"{self.address} does not answer as Ray's dashboard does")
        return found

    def _json(self, path: str) -> Any:
        response = self._send("GET", path)
        self._check(response)
        try:
            return response.json()
        except ValueError:
            raise DashboardError(
                f"{self.address} does not answer as Ray's dashboard does; --address names it"
            ) from None

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            return self._client.request(method, path, **content)
        except httpx.ConnectError:
            raise DashboardError(
                f"nothing answers at {self.address}: start the cluster, or name its dashboard with"
                " --address"
            ) from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise DashboardError(f"the call to {self.address} failed: {error!r}") from None

    def _check(self, response: httpx.Response) -> None:
        if response.status_code in (401, 403):
            raise DashboardError(
                f"the dashboard at {self.address} asks for the cluster's token: name the file that"
                " has it with --token-file (`ray get-auth-token` prints it on the head)"
            )
        if response.is_error:
            raise DashboardError(
                f"the dashboard at {self.address} answered {response.status_code}:"
                f" {first_line(response.text)}"
            )


def node_of(row: Mapping[str, Any]) -> ClusterNode:
    """Return a node from a row of Ray's state API."""
    resources = row.get("resources_total") or {}
    kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    return ClusterNode(
        ip=str(row.get("node_ip")),
        num_cpus=float(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        accelerator=kinds[0] if kinds else None,
        labels=row.get("labels") or {},
    )


def first_line(text: str) -> str:
    """Return the first line of a text that says something, or `nothing` of an empty one."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "nothing")


def dashboard_at(address: str, token_file: Path | None) -> Dashboard:
    """Return the dashboard at that address, with the token that Ray would use."""
    return Dashboard(address, find_token(token_file, environment(), Path.home()))
