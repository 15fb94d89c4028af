"""One rank of a test, as a program: `python rank_main.py FOLDER` runs the call in FOLDER and leaves its result there.

Its rank, the number of ranks and the port come from the environment, as torchrun would set them.
"""

import faulthandler
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import torch

from braid.parallel.data_parallel import init_world

if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # asked for when the call takes too long: where does this rank stand?
    torch.set_num_threads(1)
    folder, rank, size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sys.path, call, patience_s, lost = pickle.loads((folder / "call").read_bytes())
    body, args = pickle.loads(call)
    world = init_world("cpu", patience_s)
    result = body(world, *args)
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    # A rank that leaves while another still connects to it would fail that one.
    while not all((folder / f"result-{other}").exists() for other in range(size) if other not in lost):
        time.sleep(0.005)
    world.close()
