"""What is wrong with a config file as a whole is said in one sentence that names the key."""

import copy
import errno
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from flux_ray.config.checks import (
    APPLICATION_KEYS,
    FILE_KEYS,
    HTTP_KEYS,
    WEIGHT_FILES,
    check_file,
    check_paths,
    read_http_options,
    tiers_among,
)
from flux_ray.config.tier import TierArgs

LAPTOP = Path(__file__).parents[2] / "serve" / "laptop.yaml"
HUB = "owner/name@revision"
KEY = (
    f"{{name: a, prefix: fr-00000000, sha256: {'a' * 64}, class: paying,"
    " created: 2026-11-01T00:00:00Z}"
)


@pytest.fixture
def config() -> dict[str, Any]:
    """serve/laptop.yaml: the gateway, `tiny` and `tiny-tp2`."""
    return yaml.safe_load(LAPTOP.read_text())


def changed(config: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """Set `applications.1.args.device` to a value; None as a value removes the key."""
    changed = copy.deepcopy(config)
    *way, last = place.split(".")
    inner: Any = changed
    for part in way:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    key = int(last) if isinstance(inner, list) else last
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return changed


def texts(config: dict[str, Any], *, warnings: bool = False, **options: Any) -> list[str]:
    _, findings = check_file(config, **options)
    return [each.text for each in findings if each.is_warning == warnings]


@pytest.mark.parametrize("path", sorted(LAPTOP.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_our_own_files_have_no_errors(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    applications, findings = check_file(config)
    assert [each.text for each in findings if not each.is_warning] == []
    assert len(applications) == len(config["applications"])


def test_the_keys_are_those_of_serve() -> None:
    """A release of Ray with another key would make a good file an error."""
    assert set(ServeDeploySchema.model_fields) == FILE_KEYS
    assert set(ServeApplicationSchema.model_fields) == APPLICATION_KEYS
    assert set(HTTPOptionsSchema.model_fields) == HTTP_KEYS


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("http_option", {}, "http_option: Serve knows no such key; did you mean http_options?"),
        ("http_options.prot", 1, "http_options.prot: Serve knows no such key; did you mean port?"),
        (
            "applications.1.arg",
            {},
            "application tiny: arg: Serve knows no such key; did you mean args?",
        ),
        (
            "applications.1.args.devise",
            "cpu",
            "application tiny: args.devise: Extra inputs are not permitted; did you mean device?",
        ),
        (
            "applications.2.args.parallel.tensr",
            2,
            "application tiny-tp2: args.parallel.tensr: Extra inputs are not permitted;"
            " did you mean tensor?",
        ),
        (
            "applications.0.args.limits",
            {"max_image": 3},
            "application gateway: args.limits.max_image: Extra inputs are not permitted;"
            " did you mean max_images?",
        ),
        (
            "applications.2.args.parallel.tensor",
            3,
            "application tiny-tp2: args: Value error, tier tiny-tp2: parallel.tensor 3 does not"
            " divide the 4 heads",
        ),
        (
            "applications.2.args.parallel",
            {"tensor": 2, "sequence": 3},
            "application tiny-tp2: args: Value error, tier tiny-tp2: parallel.sequence 3 does not"
            " divide the 2 heads that each rank has at parallel.tensor 2",
        ),
        (
            "applications.2.name",
            "tiny",
            "application tiny: name: two applications have it; rename one of them",
        ),
        (
            "applications.2.args.tier",
            "tiny",
            "args.tier: two applications serve tiny; keep one, and set its num_replicas",
        ),
        (
            "applications.1.name",
            "small",
            "application small: name: gateways look for tiny, its tier; give the application that"
            " name",
        ),
        (
            "applications.1.route_prefix",
            "/tiny",
            "application tiny: route_prefix: a tier has no route, its gateway has; say"
            " `route_prefix: null`",
        ),
        (
            "applications.1",
            None,
            "application gateway: args.tiers: tiny has no application in this file; add one, or"
            " take it off the list",
        ),
        (
            "applications.0.args.aliases",
            {"flux-dev": "flux-2-dev"},
            "application gateway: args: Value error, aliases.flux-dev.tiers: no tier and no alias"
            " 'flux-2-dev' is served here",
        ),
        (
            "applications.1.import_path",
            "flux_ray.app:build_teir",
            "application tiny: import_path flux_ray.app:build_teir is none of"
            " flux_ray.app:build_tier, flux_ray.app:build_gateway",
        ),
    ],
)
def test_one_thing_is_wrong(config: dict[str, Any], place: str, value: Any, said: str) -> None:
    assert texts(config) == []
    assert said in texts(changed(config, place, value))


def test_a_tier_without_a_route_prefix_would_be_at_the_gateways(config: dict[str, Any]) -> None:
    """Serve's default is `/`."""
    del config["applications"][1]["route_prefix"]
    (said,) = texts(config)
    assert "application tiny: route_prefix" in said


def test_two_gateways_at_one_route(config: dict[str, Any]) -> None:
    second = config["applications"][0] | {"name": "second"}
    config["applications"].append(second)
    assert texts(config) == [
        "route_prefix /: gateway, second have it; give each application its own"
    ]
    second["route_prefix"] = "/second"
    assert texts(config) == []


def test_all_errors_are_found_at_once(config: dict[str, Any]) -> None:
    config["applications"][1]["args"] |= {"nonsense": 1, "dtype": "float8"}
    said = texts(changed(config, "http_options.nothing", 1))
    assert len(said) == 3


@pytest.mark.parametrize(
    ("host", "keys_file", "num_warnings"),
    [("127.0.0.1", None, 0), ("0.0.0.0", None, 1), ("::", None, 1), ("0.0.0.0", "keys.yaml", 0)],
)
def test_all_addresses_without_keys(
    config: dict[str, Any], host: str, keys_file: str | None, num_warnings: int
) -> None:
    config["http_options"]["host"] = host
    config["applications"][0]["args"]["keys_file"] = keys_file
    said = texts(config, warnings=True)
    assert len(said) == num_warnings
    assert all(f"http_options.host '{host}': everybody" in each for each in said)


def test_serves_default_host_is_all_addresses(config: dict[str, Any]) -> None:
    del config["http_options"]["host"]
    assert HTTPOptionsSchema().host == "0.0.0.0"
    assert "everybody who reaches this machine is let in" in texts(config, warnings=True)[0]


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "::1", "port": 80}, "http://[::1]:80"),
        ({"host": "10.1.2.3", "port": 80}, "http://10.1.2.3:80"),
        ({"port": 443, "ssl_certfile": "c", "ssl_keyfile": "k"}, "https://127.0.0.1:443"),
    ],
)
def test_the_address_is_one_that_can_be_opened(options: dict[str, Any], url: str) -> None:
    found, wrong = read_http_options({"http_options": options})
    assert (found.url, wrong) == (url, [])


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("http_options", 8000, "http_options: Input should be a valid dictionary"),
        ("http_options.port", "x", "http_options.port: Input should be a valid integer"),
        ("http_options.host", 1, "http_options.host: Input should be a valid string"),
    ],
)
def test_http_options_that_serve_would_refuse(
    config: dict[str, Any], place: str, value: Any, said: str
) -> None:
    with pytest.raises(ValueError):
        ServeDeploySchema.model_validate(changed(config, place, value))
    (found,) = texts(changed(config, place, value))
    assert found.startswith(said)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("http_options.request_timeout_s", 600, "http_options.request_timeout_s 600 ends requests"),
        ("applications.0.args.drain_timeout_s", 60, "args.drain_timeout_s 60 is not above"),
        ("applications.0.args.tiers", ["tiny"], "application tiny-tp2: no gateway lists it"),
    ],
)
def test_what_may_be_meant_is_a_warning(
    config: dict[str, Any], place: str, value: Any, said: str
) -> None:
    config = changed(config, place, value)
    assert texts(config) == []
    (warning,) = texts(config, warnings=True)
    assert said in warning


def test_other_applications_pass_only_if_that_is_said(config: dict[str, Any]) -> None:
    other = {"name": "other", "route_prefix": "/other", "import_path": "mine:app", "args": {"x": 1}}
    config["applications"].append(other)
    assert "application other: import_path mine:app is none of" in texts(config)[0]
    assert texts(config, allow_others=True) == []
    other["import_path"] = "flux_ray.app:build_gatway"
    assert len(texts(config, allow_others=True)) == 1


def test_missing_weights(config: dict[str, Any], tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    config["applications"][1]["args"]["weights"] = str(weights)
    applications, _ = check_file(config)
    (found,) = check_paths(applications, is_here=True)
    assert f"application tiny: args.weights: {weights} is not there" in found.text
    assert not found.is_warning
    (found,) = check_paths(applications, is_here=False)
    assert found.is_warning and "has to be on every node" in found.text
    weights.mkdir()
    assert all(each.is_warning for each in check_paths(applications, is_here=False))
    for number, pattern in enumerate(WEIGHT_FILES, 1):
        file = weights / pattern.replace("*", "model")
        file.parent.mkdir(parents=True)
        file.touch()
        found = list(check_paths(applications, is_here=True))
        assert len(found) == len(WEIGHT_FILES) - number
        assert all("download the whole checkpoint again" in each.text for each in found)


def test_missing_adapters_and_keys(config: dict[str, Any], tmp_path: Path) -> None:
    config["applications"][0]["args"]["keys_file"] = str(tmp_path / "keys.yaml")
    config["applications"][1]["args"]["loras"] = [{"path": str(tmp_path / "a.safetensors")}]
    applications, _ = check_file(config)
    said = [each.text for each in check_paths(applications, is_here=True)]
    assert [text.split(": ")[1] for text in said] == ["args.loras", "args.keys_file"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keys: 3", "keys: Input should be a valid tuple"),
        (f"keys: [{KEY}]", "fr-00000000 is of the class paying, which is unknown"),
        (None, "Permission denied"),
    ],
)
@pytest.mark.parametrize("is_here", [True, False])
def test_keys_that_a_gateway_could_not_use(
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_here: bool,
    text: str | None,
    said: str,
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text or "")
    if text is None:
        # Root, who may run this, reads any file.
        refused = PermissionError(errno.EACCES, "Permission denied")
        monkeypatch.setattr(Path, "read_text", Mock(side_effect=refused))
    config["applications"][0]["args"]["keys_file"] = str(path)
    applications, _ = check_file(config)
    (found,) = check_paths(applications, is_here=is_here)
    assert found.text.startswith("application gateway: args.keys_file: ") and said in found.text
    assert found.is_warning != is_here


def test_a_hub_id_is_no_path(config: dict[str, Any]) -> None:
    config["applications"][1]["args"]["weights"] = HUB
    applications, _ = check_file(config)
    assert list(check_paths(applications, is_here=True)) == []
    assert {each.name for each in tiers_among(applications)} == {"tiny", "tiny-tp2"}


def test_a_folder_may_hold_a_model_with_other_heads(tmp_path: Path) -> None:
    """Only the loader knows its shape; it says the same."""
    assert TierArgs(tier="tiny", weights=str(tmp_path), parallel={"tensor": 3})
    with pytest.raises(ValueError, match=r"parallel\.tensor 5 does not divide the 48 heads"):
        TierArgs(tier="flux-2-dev", weights=HUB, parallel={"tensor": 5})
