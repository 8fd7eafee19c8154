"""How the job database became what it is: alembic's environment, and each release's changes.

Gateways of two releases share the database while a cluster is upgraded. So a change only adds, and
what it adds may be left out by those who do not know it: columns are nullable or have a default of
the server. What nobody needs any more is dropped a release later.
"""
