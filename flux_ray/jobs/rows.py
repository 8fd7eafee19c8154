"""Jobs as rows of their table, and back."""

from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Column, ColumnElement, RowMapping, literal

from flux_ray.jobs.job import Job, JobFailure, JobResult
from flux_ray.jobs.table import JOBS
from flux_ray.request import QueuePosition

COLUMNS = tuple(JOBS.c[name] for name in Job.__dataclass_fields__)
RESULT = TypeAdapter(JobResult)
FAILURE = TypeAdapter(JobFailure)
STANDING = TypeAdapter(QueuePosition)


def bound(value: Any, column: Column[Any]) -> ColumnElement[Any]:
    """The value as what the column holds, or SQL as it is."""
    return value if isinstance(value, ColumnElement) else literal(value, column.type)


def job_of(row: RowMapping) -> Job:
    """The row as a value."""
    values = {name: row[name] for name in Job.__dataclass_fields__}
    if values["result"] is not None:
        values["result"] = RESULT.validate_python(values["result"])
    if values["failure"] is not None:
        values["failure"] = FAILURE.validate_python(values["failure"])
    # A gateway of an earlier release wrote none.
    values["metadata"] = values["metadata"] or {}
    if values["standing"] is not None:
        values["standing"] = STANDING.validate_python(values["standing"])
    return Job(**values)
