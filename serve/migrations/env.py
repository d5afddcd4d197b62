"""Alembic's entry: migrates over the connection that the store hands it, within that one's transaction."""

from __future__ import annotations

from alembic import context

from serve.store import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
