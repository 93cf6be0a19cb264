"""`runs resume ID --set modal.KEY=VALUE`: a job goes on with other limits and a new worst case."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from composer_replication.cli.launching import MODAL_PREFIX
from composer_replication.errors import InputError

if TYPE_CHECKING:
    from composer_replication.launch.job import Job
    from composer_replication.launch.records import LaunchRecord


def with_other_limits(job: "Job", record: "LaunchRecord", overrides: Sequence[str]) -> "Job":
    """The job with what the overrides set; the record gets what it may cost then.

    Args:
        job: as it was launched on Modal.
        record: of the job; its rates and worst case are replaced.
        overrides: `modal.KEY=VALUE`; none: nothing changes.

    Raises:
        InputError: a key outside `[modal]`: what a run computes stays as it was started.
    """
    from composer_replication.config.loading import load_config
    from composer_replication.planner.cost import estimate
    from composer_replication.planner.hardware import parse_gpu

    for override in overrides:
        if not override.startswith(MODAL_PREFIX):
            raise InputError(
                f"--set {override}: a job goes on as it was started; only the limits of [modal] "
                "can change. Write for example --set modal.timeout_s=7200, or start a new run."
            )
    if not overrides:
        return job
    given = load_config(None, overrides).modal
    values = given.model_dump(exclude_unset=True)
    record.region = values.pop("region", record.region)
    job = replace(job, **values)
    assert job.gpu is not None, "a remote run has a card"
    assert job.timeout_s is not None, "a remote run has a time-out"
    card = parse_gpu(job.gpu)
    cost = estimate(
        card.gpu.name,
        card.num_gpus,
        job.timeout_s,
        cpu_cores=job.cpu_cores,
        memory_gib=job.memory_gib,
        region=record.region,
        retries=job.retries,
    )
    record.usd_per_hour, record.worst_usd = cost.usd_per_hour, cost.worst_usd
    return job
