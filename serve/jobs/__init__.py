"""Jobs: created from requests, their models, files and webhooks."""
