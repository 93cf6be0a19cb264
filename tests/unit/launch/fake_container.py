"""The inside of a container of `fake_modal`: imports the body by its name and calls it."""

import importlib
import pickle
import sys
from pathlib import Path


def main(home):
    module, name, (args, kwargs) = pickle.loads((home / "input").read_bytes())
    try:
        body = getattr(importlib.import_module(module), name)
        (home / "started").touch()
        answer = (True, body(*args, **kwargs))
    except Exception as error:
        answer = (False, f"{type(error).__name__}: {error}")
        print(answer[1], flush=True)
    (home / "output").write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
