"""`flux-ray keys`."""

from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from flux_ray.auth.keys import Keyring, read_keys
from flux_ray.cli.main import app


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.yaml"

    def keys(*arguments):
        words = ["keys", *(str(argument) for argument in arguments), "--file", str(path)]
        return CliRunner().invoke(app, words)

    keys.path = path
    return keys


def test_create_list_revoke(keys):
    made = keys("create", "alice", "--class", "paying")
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    key = Keyring(read_keys(keys.path)).find(secret, datetime.now(UTC))
    assert (key.name, key.key_class, key.expires) == ("alice", "paying", None)
    assert secret not in keys.path.read_text()
    listed = keys("list").stdout
    assert key.prefix in listed and "paying" in listed and "live" in listed
    assert secret not in listed and key.sha256 not in listed
    revoked = keys("revoke", key.prefix)
    assert (revoked.exit_code, revoked.stdout) == (0, f"revoked {key.prefix} of alice\n")
    assert "revoked" in keys("list").stdout
    assert Keyring(read_keys(keys.path)).find(secret, datetime.now(UTC)) is None


def test_all_keys_of_a_name_are_revoked_once(keys):
    for _ in range(2):
        keys("create", "alice")
        assert keys("revoke", "alice").stdout.count("\n") == 1
    for _ in range(2):
        keys("create", "alice")
    assert keys("revoke", "alice").stdout.count("revoked fr-") == 2


def test_a_key_expires(keys):
    keys("create", "alice", "--expires-in-days", "0")
    keys("create", "alice", "--expires-in-days", "1")
    _, new = read_keys(keys.path).keys
    assert (new.expires - new.created).days == 1
    listed = keys("list").stdout
    assert "expired" in listed and "live" in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "a b"), "should match pattern"),
        (("create", "bob", "--class", "other"), "the keys of bob are of two classes"),
        (("revoke", "alice"), "no key that is not revoked has the prefix or the name alice"),
    ],
)
def test_what_cannot_be_done_is_said(keys, arguments, message):
    keys("create", "bob")
    before = keys.path.read_text()
    result = keys(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert keys.path.read_text() == before


def test_a_broken_file_stays(keys):
    keys.path.write_text("keys: 3")
    for arguments in (("create", "bob"), ("list",), ("revoke", "bob")):
        result = keys(*arguments)
        assert result.exit_code == 1
        assert "error:" in result.stderr
    assert keys.path.read_text() == "keys: 3"


@pytest.fixture
def gateway_args(keys, gateway_args):
    keys.secret = keys("create", "alice").stdout
    return gateway_args.model_copy(update={"keys_file": keys.path})


def test_a_gateway_that_asks_for_keys_is_sent_one(keys, url, tmp_path):
    key_file = tmp_path / "alice.key"
    arguments = ["tiers", "--url", url, "--key-file", str(key_file)]
    key_file.write_text(keys.secret)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    key_file.write_text("fr-wrong")
    refused = CliRunner().invoke(app, arguments)
    assert (refused.exit_code, "send a valid API key" in refused.stderr) == (1, True)
    for text in ("", "two words", "\xe4"):
        key_file.write_text(text)
        assert "holds no API key" in CliRunner().invoke(app, arguments).stderr
