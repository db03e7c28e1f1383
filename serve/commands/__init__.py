"""The command line of a service's operator: keys, jobs, store."""
