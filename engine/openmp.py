"""How OpenMP's threads wait for work: read once, when torch loads, so a script imports this before torch.

By default they spin: on two cores beside other busy processes a step then takes many times as long
(docs/log.md, "how threads wait"). What the environment says already wins.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_threads(count: int) -> None:
    """Compute with `count` CPU threads; 0: as many as torch takes by itself, one a core."""
    import torch  # not at the top: the line above has to come first

    if count:
        torch.set_num_threads(count)
