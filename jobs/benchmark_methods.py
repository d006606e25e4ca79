"""Compare every way of personalising on every data set.

    ray job submit --working-dir . -- python jobs/benchmark_methods.py --config benchmark.yaml

`python jobs/benchmark_methods.py --help` lists the settings; paths must be ones that every node of the cluster can
reach. A job that was stopped goes on where it was when it is submitted again.
"""

from mta_ray.cli import run_stage

if __name__ == "__main__":
    raise SystemExit(run_stage("benchmark"))
