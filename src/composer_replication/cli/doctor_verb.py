"""`doctor`: what this machine can run, and what is missing."""

import argparse

from composer_replication.cli.verb import EXIT_FAILED, JSON, Answer, Verb

_EPILOG = """\
Writes nothing.

exit codes: 0 ready, 1 something that a smoke needs is missing"""


def _doctor(options: argparse.Namespace) -> Answer:
    from rich.console import Console

    from composer_replication.experiments.doctor import doctor_summary, render_doctor, run_doctor
    from composer_replication.runs.json_text import to_json_text

    lines = run_doctor()
    if not options.json:
        render_doctor(lines, Console())
    answer = doctor_summary(lines)
    return to_json_text(answer, indent=2), 0 if answer["is_ok"] else EXIT_FAILED


DOCTOR = Verb(
    name="doctor",
    summary="what this machine can run, and what is missing",
    purpose="Says what this machine can run, and what is missing.",
    epilog=_EPILOG,
    options=(JSON,),
    carry_out=_doctor,
    computes=False,
)
