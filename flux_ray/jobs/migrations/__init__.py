"""The migrations of the job database: alembic's environment, and a file for each change.

Gateways of two releases share the database while a cluster is upgraded. So a migration only adds,
and gateways of the earlier release must be able to leave out what it adds: new columns are nullable
or have a default in the server. What is no longer needed is dropped one release later.
"""
