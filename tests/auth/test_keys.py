"""Keys, and whose a secret is."""

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from flux_ray.auth.keys import KeyFile, Keyring, hash_secret, new_key, with_key, without_key

NOW = datetime(2026, 11, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def test_a_secret_is_recognised_and_is_not_kept():
    key, secret = new_key("alice", "paying", NOW)
    assert secret.startswith("fr-") and len(secret) == 46
    assert secret.startswith(key.prefix) and len(key.prefix) == 11
    assert key.sha256 == hash_secret(secret)
    assert secret not in key.model_dump_json()
    assert new_key("alice", "paying", NOW).secret != secret


def test_a_secret_is_its_keys_and_nobody_elses():
    alice, bob = new_key("alice", None, NOW), new_key("bob", None, NOW)
    ring = Keyring(KeyFile(keys=(alice.key, bob.key)))
    assert ring.find(alice.secret, NOW) == alice.key
    assert ring.find(bob.secret, NOW) == bob.key
    for wrong in ("", "fr-", alice.key.prefix, alice.secret[:-1], alice.secret + "x", "\xff" * 50):
        assert ring.find(wrong, NOW) is None
    assert ring.find(alice.key.prefix + bob.secret[11:], NOW) is None
    assert ring.find(alice.key.sha256, NOW) is None
    assert Keyring(KeyFile()).find(alice.secret, NOW) is None


def test_a_key_ends_when_it_expires_or_is_revoked():
    expiring, revoked = new_key("a", None, NOW, NOW + DAY), new_key("b", None, NOW)
    file = KeyFile(keys=(expiring.key, revoked.key))
    assert Keyring(file).find(expiring.secret, NOW + DAY / 2) is not None
    assert Keyring(file).find(expiring.secret, NOW + DAY) is None
    ring = Keyring(without_key(file, "b", NOW + DAY))
    assert ring.find(revoked.secret, NOW + DAY) is None


def test_a_name_may_have_two_keys_while_one_replaces_the_other():
    old, new = new_key("alice", "paying", NOW), new_key("alice", "paying", NOW)
    file = with_key(KeyFile(keys=(old.key,)), new.key)
    by_prefix = without_key(file, old.key.prefix, NOW)
    assert [key.revoked for key in by_prefix.keys] == [NOW, None]
    by_name = without_key(by_prefix, "alice", NOW + DAY)
    assert [key.revoked for key in by_name.keys] == [NOW, NOW + DAY], "once is enough"
    for which in ("alice", "bob", old.key.prefix):
        with pytest.raises(ValueError, match="no key that is not revoked"):
            without_key(by_name, which, NOW)


def test_a_file_that_contradicts_itself_is_refused():
    key = new_key("alice", "paying", NOW).key
    with pytest.raises(ValidationError, match=f"two keys have the prefix {key.prefix}"):
        KeyFile(keys=(key, key))
    other = new_key("alice", "other", NOW).key
    with pytest.raises(ValidationError, match="the keys of alice are of two classes"):
        KeyFile(keys=(key, other))
    assert KeyFile(keys=(key.model_copy(update={"revoked": NOW}), other))
    with pytest.raises(ValueError, match="class paying, which is unknown"):
        KeyFile(keys=(key,)).check_classes(["other"])
    KeyFile(keys=(key, new_key("bob", None, NOW).key)).check_classes(["paying"])


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "a b"},
        {"name": "[red]"},
        {"prefix": "sk-12345678"},
        {"sha256": "ab"},
        {"created": "2026-11-01T00:00:00"},
        {"secret": "fr-x"},
    ],
)
def test_unknown_and_odd_fields_are_refused(changed):
    kept = new_key("alice", None, NOW).key.model_dump(mode="json", by_alias=True)
    with pytest.raises(ValidationError):
        KeyFile.model_validate({"keys": [kept | changed]})
