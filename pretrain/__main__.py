"""`python -m braid.pretrain RECIPE [key=value ...]`: what torchrun starts; the same as `braid pretrain`."""

from __future__ import annotations

import os
import sys

# `-m` puts the working directory first on the path. In Braid's own folder that would make `kernels`, `launch` and the
# others importable under their bare names, where they hide packages of the same name (Hugging Face's `kernels`).
if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from braid.pretrain.command import run  # noqa: E402
from braid.pretrain.exits import run_and_report  # noqa: E402

if __name__ == "__main__":
    code = run_and_report(lambda: run(sys.argv[1:]))
    sys.stdout.flush()
    sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Everything is saved and closed. Threads of torch's process group now and then abort the interpreter's
        # teardown ("terminate called without an active exception"), and torchrun would call a finished run failed.
        os._exit(code)
    sys.exit(code)
