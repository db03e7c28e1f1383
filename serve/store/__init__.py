"""The job store, in SQLite or Postgres: each job's request, its progress, and the holder of its lease."""
