"""The keys file is read again when it changes; a broken one changes nothing."""

import logging
from datetime import UTC, datetime

import pytest

from flux_ray.auth.keys import (
    KeyFile,
    KeyWatch,
    change_keys,
    new_key,
    with_key,
    without_key,
    write_keys,
)

NOW = datetime(2026, 11, 1, tzinfo=UTC)
OLD, NEW = new_key("alice", None, NOW), new_key("alice", None, NOW)


@pytest.fixture
def path(tmp_path):
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(OLD.key,)))
    return tmp_path / "keys.yaml"


async def found(watch):
    return [await watch.find(each.secret) is not None for each in (OLD, NEW)]


async def test_a_key_is_replaced_without_a_restart(path):
    watch = KeyWatch(path, (), period_s=0)
    assert await found(watch) == [True, False]
    change_keys(path, lambda file: with_key(file, NEW.key))
    assert await found(watch) == [True, True]
    change_keys(path, lambda file: without_key(file, OLD.key.prefix, NOW))
    assert await found(watch) == [False, True]


async def test_it_looks_once_in_a_while(path):
    watch = KeyWatch(path, (), period_s=1000)
    path.unlink()
    change_keys(path, lambda file: with_key(file, NEW.key))
    assert await found(watch) == [True, False]


@pytest.mark.parametrize(
    "text", ["keys: [", "keys: 3", "keys: [{name: x}]", None, "a class that is unknown"]
)
async def test_a_broken_file_keeps_the_old_keys_and_is_told_once(path, serve_log, text):
    watch = KeyWatch(path, ("paying",), period_s=0)
    if text is None:
        path.unlink()
    elif text.startswith("a class"):
        write_keys(path, KeyFile(keys=(new_key("bob", "other", NOW).key,)))
    else:
        path.write_text(text)
    for _ in range(3):
        assert await found(watch) == [True, False]
    errors = [record for record in serve_log.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "the keys stay as they are" in errors[0].getMessage()
    write_keys(path, KeyFile(keys=(NEW.key,)))
    assert await found(watch) == [False, True], "and mended, it counts again"


def test_a_file_that_cannot_be_read_at_first_is_an_error(path):
    path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        KeyWatch(path, ())
