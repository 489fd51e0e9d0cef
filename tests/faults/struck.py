"""What torchrun starts in the tests: `penchant` with faults that lie in wait in one process of one attempt.

The environment says which: STRIKES is JSON, a list with a fault (or null) for each attempt, which meets the last
process.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from penchant.cli import main
from tests.faults.nursery import Fault

if __name__ == "__main__":
    torch.set_num_threads(1)
    strikes = json.loads(os.environ["STRIKES"])
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    if rank == int(os.environ["WORLD_SIZE"]) - 1 and attempt < len(strikes) and strikes[attempt]:
        Fault(**strikes[attempt]).arm()
    sys.exit(main())
