"""A simulated population through the pipeline: made, embedded, routed, stored.

    ray job submit --working-dir . -- python jobs/simulate_population.py --config simulate_population.yaml

`python jobs/simulate_population.py --help` lists the settings; paths must be ones that every node of the cluster can
reach.
"""

from mta_ray.cli import run_stage

if __name__ == "__main__":
    raise SystemExit(run_stage("simulate population"))
