"""Typed configuration of durable jobs."""

from typing import Any

from pydantic import Field, model_validator

from flux_ray.config.tier import Args, Seconds


class JobArgs(Args):
    """Durable jobs: where they are kept, and for how long.

    `database`: `sqlite:///` and a file, for the gateways of one machine; `postgresql://` for more.
    `results`: a folder, or a URL of fsspec (`s3://bucket/folder`), of which `results_options` say
    more (`endpoint_url`). `lease_s`: after so long without a sign of its worker a job is another's.
    `keep_s`: so long an ended job and its pictures are there, and so long one waits that no gateway
    takes. `max_running`: of one gateway and tier at once, of one owner three quarters of that.
    `max_lost`: a job that was lost with so many workers is given up. `webhook_retries_s`: pauses
    before a webhook that was not taken is posted again; then it is given up.
    """

    database: str = Field(
        "sqlite:///~/.flux-ray/jobs.sqlite3", pattern="^(sqlite:///.|postgresql://)"
    )
    results: str = "~/.flux-ray/results"
    results_options: dict[str, Any] = Field(default_factory=dict)
    lease_s: Seconds = 30.0
    keep_s: Seconds = 24 * 3600.0
    max_running: int = Field(64, ge=1)
    max_lost: int = Field(5, ge=1)
    webhook_retries_s: tuple[Seconds, ...] = (1.0, 5.0, 30.0, 300.0, 1800.0)

    @model_validator(mode="after")
    def check_times(self) -> "JobArgs":
        """A worker that comes late must still find what it may not end."""
        if self.keep_s < self.lease_s:
            raise ValueError(f"keep_s {self.keep_s:g} is below lease_s {self.lease_s:g}")
        return self
