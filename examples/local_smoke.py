"""The smoke on this machine: 50 steps of the three channels on Qwen2.5-0.5B-Instruct, with figures.

    python examples/local_smoke.py
    python examples/local_smoke.py --model smollm2-135m --steps 8

Options are those of `composer-replication smoke`; examples/modal_app.py runs this body on Modal.
"""

import sys

from composer_replication.cli import main

if __name__ == "__main__":
    sys.exit(main(["smoke", *sys.argv[1:]]))
