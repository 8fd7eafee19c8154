"""The migration of a job database, new or old, to the tables of this release."""

import logging
from pathlib import Path

from sqlalchemy import Connection, inspect

from flux_ray.jobs.table import JOBS, METADATA, SECRETS

logger = logging.getLogger("ray.serve")

# Not alembic's default name: other programs may have their own in the same database.
VERSION_TABLE = "flux_alembic_version"
# The revision of databases that were made before there were migrations.
FIRST = "0001"


def migrate(connection: Connection) -> None:
    """Create or migrate the tables in the connection's transaction, for which other gateways wait.

    A database that a newer release has migrated stays as it is: this release needs none of what was
    added.
    """
    # Imported only when a database is opened: every process of a replica imports this module.
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    options = {"version_table": VERSION_TABLE}
    heads = set(MigrationContext.configure(connection, opts=options).get_current_heads())
    known = {each.revision for each in ScriptDirectory.from_config(config).walk_revisions()}
    if unknown := heads - known:
        logger.info("a newer release made the job database: %s", ", ".join(sorted(unknown)))
        return
    tables = set(inspect(connection).get_table_names())
    if JOBS.name not in tables and (heads or SECRETS.name in tables):
        # Somebody dropped the table of jobs; the version or the secrets may be left. The
        # migrations would fail on those, so the tables are made as they are today.
        METADATA.create_all(connection)
        command.stamp(config, "head")
        return
    if not heads and JOBS.name in tables:
        command.stamp(config, FIRST)
    command.upgrade(config, "head")
    METADATA.create_all(connection)
