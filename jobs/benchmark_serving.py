"""Measure the service: decoding next to PEFT and merging, a full store next to an empty one, Ray Serve's share.

    python jobs/benchmark_serving.py --json FILE

It needs a quiet machine more than a cluster; `python jobs/benchmark_serving.py --help` lists the settings.
"""

from mta_ray.benchmarks.serving import main

if __name__ == "__main__":
    main()
