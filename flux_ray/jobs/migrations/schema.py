"""Brings the tables of a database to what this release needs."""

import logging
from pathlib import Path

from sqlalchemy import Connection, inspect

from flux_ray.jobs.table import JOBS, METADATA, SECRETS

logger = logging.getLogger("ray.serve")

# Of its own name: others may keep theirs in the same database.
VERSION_TABLE = "flux_alembic_version"
# Of databases that were made before there were migrations.
FIRST = "0001"


def migrate(connection: Connection) -> None:
    """Make the tables or change them, in the connection's transaction, which others wait for.

    A database that a newer release has changed stays as it is: what it has more is not needed here.
    """
    # Only where a database is opened: every process of a replica imports this module.
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
        # Somebody dropped it, and others may be left.
        METADATA.create_all(connection)
        command.stamp(config, "head")
        return
    if not heads and JOBS.name in tables:
        command.stamp(config, FIRST)
    command.upgrade(config, "head")
    METADATA.create_all(connection)
