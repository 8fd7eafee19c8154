"""The script that alembic runs: it migrates on the connection that it is given."""

from alembic import context

from flux_ray.jobs.migrations.schema import VERSION_TABLE
from flux_ray.jobs.table import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
)
context.run_migrations()
