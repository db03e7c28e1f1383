"""Retries a failed job for an operator: a new job of the same tenant, from the same request and files."""

from __future__ import annotations

from ..store.audit import Actor
from ..store.jobs import Job, new_job_id
from ..store.tables import FAILED
from .job_request import input_key
from .services import Context


class NotRetriable(ValueError):
    """The job has not failed, or the files that it starts from are gone."""


def retry(context: Context, job: Job, by: Actor) -> Job:
    """Return the new job, which no quota holds back. Raises NotRetriable."""
    if job.state != FAILED:
        raise NotRetriable(f"job must have failed or been cancelled, and {job.id} is {job.state}")
    job_id, names = new_job_id(), job.request.get("inputs", ())
    try:
        for name in names:
            context.artifacts.copy(input_key(job.id, name), input_key(job_id, name))
        return context.jobs.create(
            job.tenant,
            {**job.request, "retried_from": job.id},
            job_id=job_id,
            priority=job.priority,
            work=job.work,
            webhook_url=job.webhook_url,
            model=job.model,
            variant=job.variant,
            revision=job.revision,
            job_class=context.tenants.class_of(job.tenant),
            by=by,
        )
    except BaseException as error:
        if names:
            context.artifacts.remove(f"jobs/{job_id}")
        if isinstance(error, FileNotFoundError):
            raise NotRetriable(f"job {job.id} starts from files that are gone") from None
        raise
