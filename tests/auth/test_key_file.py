"""The keys file on disk."""

import json
import os
import threading
from datetime import UTC, datetime

import pytest

from flux_ray.auth.keys import (
    KeyFile,
    change_keys,
    new_key,
    read_keys,
    stamp_of,
    with_key,
    write_keys,
)

NOW = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_what_was_written_is_read(tmp_path, name):
    path = tmp_path / name
    file = KeyFile(keys=(new_key("alice", "paying", NOW).key, new_key("bob", None, NOW, NOW).key))
    write_keys(path, file)
    assert read_keys(path) == file
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == [name], "nothing else is left"
    if name.endswith(".json"):
        assert json.loads(path.read_text())["keys"][0]["class"] == "paying"


def test_a_link_is_written_through(tmp_path):
    target, link = tmp_path / "real.yaml", tmp_path / "keys.yaml"
    link.symlink_to(target)
    change_keys(link, lambda file: with_key(file, new_key("alice", None, NOW).key))
    assert link.is_symlink()
    assert len(read_keys(target).keys) == 1


@pytest.mark.parametrize("user", [0, 1000])
def test_the_gateways_user_can_go_on_reading_it(tmp_path, monkeypatch, user):
    path, owners = tmp_path / "keys.yaml", []
    write_keys(path, KeyFile())
    path.chmod(0o640)
    before = path.stat()
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "fchown", lambda handle, *owner: owners.append(owner))
    write_keys(path, KeyFile())
    assert owners == [(before.st_uid if user == 0 else -1, before.st_gid)]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("mode", "kept"), [(0o640, 0o600), (0o644, 0o644), (0o400, 0o400)])
def test_another_group_than_before_gets_no_more_than_everybody(tmp_path, monkeypatch, mode, kept):
    def refuse(*owner):
        raise PermissionError

    path = tmp_path / "keys.yaml"
    write_keys(path, KeyFile())
    path.chmod(mode)
    monkeypatch.setattr(os, "fchown", refuse)
    write_keys(path, KeyFile())
    assert path.stat().st_mode & 0o777 == kept


def test_a_change_shows_in_the_stamp(tmp_path):
    path = tmp_path / "keys.yaml"
    assert stamp_of(path) is None
    write_keys(path, KeyFile())
    before = stamp_of(path)
    assert before == stamp_of(path)
    write_keys(path, KeyFile())
    assert stamp_of(path) != before


def test_who_change_it_at_once_lose_no_key(tmp_path):
    path = tmp_path / "keys.yaml"

    def add(number):
        change_keys(path, lambda file: with_key(file, new_key(f"n{number}", None, NOW).key))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path).keys} == {f"n{number}" for number in range(8)}


def test_a_change_that_fails_leaves_the_file(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [{secret: fr-hidden}]")
    with pytest.raises(ValueError, match=r"keys\.0\.name: Field required"):
        change_keys(path, lambda file: file)
    assert path.read_text() == "keys: [{secret: fr-hidden}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [{name: fr-hidden", "cannot be read as YAML or JSON"),
        ("fr-hidden", "valid dictionary"),
        ("keys: [{name: 'fr-hidden ()'}]", r"keys\.0\."),
        ("fr-hidden: 1", "Extra inputs"),
        (b"\xff\xfe\x00fr-hidden", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_without_showing_it(tmp_path, text, message):
    path = tmp_path / "keys.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_keys(path)
    assert "hidden" not in str(caught.value).replace("fr-hidden: Extra", "")


def test_an_empty_file_has_no_keys_and_none_is_an_error(tmp_path):
    path = tmp_path / "keys.yaml"
    with pytest.raises(ValueError, match="No such file"):
        read_keys(path)
    path.write_text("")
    assert read_keys(path).keys == ()
