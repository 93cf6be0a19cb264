"""The same smoke on one L4 of Modal, for `modal run`; examples/local_smoke.py is its twin.

    modal run examples/modal_app.py
    modal run examples/modal_app.py --model Qwen/Qwen2.5-1.5B-Instruct --gpu L40S

`composer-replication smoke --on modal` does this too, and adds the plan, the question, the cap, and
the run directory brought home.
"""

import json
import time

from composer_replication.launch.function_spec import function_spec
from composer_replication.launch.job import Job, new_job_id
from composer_replication.launch.modal_job import build

ATTEMPT_S = 1800.0

DEFAULT = Job(job_id=new_job_id("smoke"), verb="smoke", gpu="L4", timeout_s=ATTEMPT_S, retries=1)
app, smoke = build(function_spec(DEFAULT))


@app.local_entrypoint()
def main(model: str = "Qwen/Qwen2.5-0.5B-Instruct", steps: int = 50, gpu: str = "L4") -> None:
    """Run it, stream what it prints, and show its summary."""
    job = Job(
        job_id=DEFAULT.job_id,
        verb="smoke",
        arguments=("--model", model, "--steps", str(steps)),
        timeout_s=ATTEMPT_S,
        retries=DEFAULT.retries,
        deadline_s=time.time() + (DEFAULT.retries + 1) * ATTEMPT_S,
    )
    result = smoke.with_options(gpu=gpu).remote(job.to_payload())
    print(json.dumps(result["summary"], indent=2))
