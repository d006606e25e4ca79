"""Measure the training of a bank: packs next to PEFT, groups, growth, ZeRO 3, and what killed processes cost.

    python jobs/benchmark_bank_training.py --json FILE

It needs a quiet machine more than a cluster; `python jobs/benchmark_bank_training.py --help` lists the settings.
"""

from mta_ray.benchmarks.bank_training import main

if __name__ == "__main__":
    main()
