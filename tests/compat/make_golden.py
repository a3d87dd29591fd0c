"""Make golden_small.npz: python tests/compat/make_golden.py

Only after tests/compat/test_compat_golden.py passed with the published code's golden data, slow ones included: the
file then holds what the published code computes, for four classes, in a form that is small enough for the repository.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import compat_lab as lab
import numpy as np
import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    config = lab.small_config(True)
    method = lab.small_method(config)
    golden = lab.small_forward(method) | lab.small_train(method, config)
    np.savez_compressed(lab.SMALL, **golden)
    print(f"{lab.SMALL.name}: {len(golden)} quantities, {lab.SMALL.stat().st_size / 1e3:.0f} kB")
