"""The job store: what was asked, where it stands and who works on it, in SQLite or Postgres."""
