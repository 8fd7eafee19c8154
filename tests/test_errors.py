"""Every error has a status and survives a process border."""

import pickle

import pytest

from flux_ray import errors
from flux_ray.errors import FluxError, Overloaded

ALL = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, FluxError)]


@pytest.mark.parametrize("error_type", ALL)
def test_every_error_survives_a_process_border(error_type):
    error = pickle.loads(pickle.dumps(error_type("why", "prompt")))
    assert type(error) is error_type
    assert (str(error), error.message, error.field) == ("why", "why", "prompt")


@pytest.mark.parametrize("error_type", ALL)
def test_every_error_is_generated_with_its_status(error_type):
    [line] = [
        line for line in errors.__doc__.splitlines() if line.split()[:1] == [error_type.__name__]
    ]
    assert line.split()[1] == str(error_type.status)


CALLERS = ("invalid_request_error", "permission_error", "rate_limit_error")


@pytest.mark.parametrize("error_type", ALL)
def test_status_and_type_agree(error_type):
    is_callers = error_type.type in CALLERS
    assert is_callers == (400 <= error_type.status < 500)


@pytest.mark.parametrize("error_type", ALL)
def test_who_may_come_back_is_told_when(error_type):
    error = error_type("why")
    assert (error.retry_after_s is not None) == (error.status in (429, 503))


def test_the_time_to_come_back_survives_a_process_border():
    assert pickle.loads(pickle.dumps(Overloaded("why", None, 7))).retry_after_s == 7
