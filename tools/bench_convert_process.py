"""One contestant of `bigbatch bench convert`, in a process of its own: `NAME CHECKPOINT OUT DTYPE`.

It prints the most memory it has held. Nothing is imported that the contestant does not need.
"""

import json
import os
import re
import sys
from pathlib import Path

CONVERT, COMPARED, ZERO_TO_FP32, BARE = "convert without fsync", "convert and compare", "zero_to_fp32", "bare"


def main(name: str, source: str, out: str, dtype: str) -> None:
    """Convert, and print the peak in bytes."""
    import torch

    torch.set_num_threads(1)
    if name == CONVERT:
        from bigbatch.tools.convert import Sizes, open_run, write_model

        os.fsync = lambda _: None  # DeepSpeed's does without
        Path(out).mkdir()
        write_model(Path(out), *open_run(Path(source)), dtype, Sizes())
    elif name == COMPARED:
        from bigbatch.tools.convert import PARITY_SAMPLES, PARITY_TOKENS, convert

        longest = json.loads((Path(source) / "run.json").read_text())["model"]["max_positions"]
        shape, generator = (PARITY_SAMPLES, min(PARITY_TOKENS, longest)), torch.Generator().manual_seed(0)
        tokens = torch.randint(16, shape, generator=generator)  # of any vocabulary
        convert(Path(source), Path(out), dtype, text={"tokens": tokens.numpy()})
    elif name == ZERO_TO_FP32:
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        convert_zero_checkpoint_to_fp32_state_dict(source, out)
    # Not ru_maxrss, in which that of the process which started this one counts.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    print(int(peak[1]) * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
