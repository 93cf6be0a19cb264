"""A job that was launched on Modal before: followed, fetched, or ended by what is on disk of it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from composer_replication.cli.modal_calls import (
    bring_home_priced,
    end_orphan,
    finish,
    result_of,
    settle_without_result,
)
from composer_replication.cli.recorded_run import RUNS_FOLDER
from composer_replication.cli.verb import Answer
from composer_replication.errors import InputError, LaunchError, UnreachableError

if TYPE_CHECKING:
    from composer_replication.launch.records import LaunchRecord

_ASK_S = 1.0
"""How long a call's result is waited for that may not be there."""


def follow(record: "LaunchRecord") -> Iterator[str]:
    """What the job has printed and prints, until it ends.

    Raises:
        InputError: its call is not known.
    """
    from composer_replication.launch import modal_job

    if record.call_id is None:
        raise InputError(
            f"{record.job_id} has no call on Modal whose output could be shown: it is "
            f"{record.status}. `composer-replication runs list` says what there is."
        )
    return modal_job.stream_logs(record.call_id)


def fetch_job(record: "LaunchRecord", say: Callable[[str], None]) -> Answer:
    """Bring its run directory home; of one that has ended since, settle what it cost.

    Raises:
        LaunchError: it is still running, ended without a result, or nobody answers.
        InputError: no credentials, or nothing is committed.
    """
    from composer_replication.launch import modal_job

    modal_job.check_credentials()
    modal_job.check_reachable()
    if record.call_id is not None and record.status != "cancelled":
        is_news = record.status == "running"
        try:
            result = result_of(record, _ASK_S)
        except TimeoutError:
            raise LaunchError(
                f"{record.job_id} is still running. Look at it with `composer-replication runs "
                f"logs {record.job_id}`, or end it with `composer-replication runs cancel "
                f"{record.job_id}`."
            ) from None
        except (UnreachableError, InputError):
            raise
        except LaunchError:
            if is_news:
                with contextlib.suppress(InputError):
                    bring_home_priced(record)
                raise
        else:
            return finish(record, result, say)
    num_files = bring_home_priced(record)
    say(f"files   {num_files} in {record.folder}")
    return record.model_dump_json(by_alias=True, indent=2), 0


def cancel_job(record: "LaunchRecord", say: Callable[[str], None]) -> Answer:
    """End it; one that had ended before comes home instead.

    Raises:
        LaunchError: nobody answers, or it had ended without a result.
        InputError: no credentials, or there is nothing to end.
    """
    from composer_replication.launch import modal_job
    from composer_replication.launch.records import save_record

    if record.status == "launching":
        end_orphan(record)
    elif record.call_id is None or record.status != "running":
        raise InputError(f"{record.job_id} is {record.status}, so there is nothing to end.")
    else:
        modal_job.check_credentials()
        modal_job.check_reachable()
        with contextlib.suppress(TimeoutError):
            result = result_of(record, _ASK_S)
            say(f"{record.job_id} had ended before.")
            return finish(record, result, say)
        modal_job.cancel(record.call_id)
        settle_without_result(record)
    record.status = "cancelled"
    save_record(RUNS_FOLDER, record)
    say(f"cancelled {record.job_id}")
    return record.model_dump_json(by_alias=True, indent=2), 0


def end_orphans(members: "Sequence[LaunchRecord]") -> None:
    """End what a launcher left that was killed between sending a member and noting its call.

    Nobody knows which of its app's calls that is, and another of the same member would be paid
    beside it, so the app is stopped. Members that ran in it go on from their newest checkpoint; of
    one that had ended the result stays.
    """
    orphans = [record for record in members if record.status == "launching"]
    for record in orphans:
        end_orphan(record)
    stopped = {record.app_id for record in orphans}
    for record in members:
        if record.status == "running" and record.app_id in stopped:
            with contextlib.suppress(LaunchError, TimeoutError):
                result_of(record, _ASK_S)
