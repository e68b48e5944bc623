"""Run seeds: python -m tests.support.simulation [--from N] [--seeds COUNT] [--trace].

Prints every seed that breaks a promise, with its trace, and the number of seeds that keep all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.support.simulation.run import run_seed, trace
from tests.support.simulation.scenario import draw
from tests.support.simulation.world import Violation


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="first", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds")
    parser.add_argument("--stop-after", type=int, default=3, help="violations to print")
    parser.add_argument("--trace", action="store_true", help="print all that happens")
    args = parser.parse_args()
    began, violations, profiles = time.monotonic(), 0, Counter[str]()
    done = 0
    for seed in range(args.first, args.first + args.seeds):
        if args.trace:
            print(draw(seed), *trace(draw(seed)), sep="\n")
            continue
        try:
            profiles[run_seed(seed).profile] += 1
        except Violation as violation:
            violations += 1
            print(f"{violation}\n", flush=True)
        done += 1
        if violations >= args.stop_after:
            break
        if done % 1000 == 0:
            print(f"{done} seeds, {time.monotonic() - began:.0f} s", flush=True)
    counts = ", ".join(f"{count} {profile}" for profile, count in sorted(profiles.items()))
    print(f"{done} seeds in {time.monotonic() - began:.1f} s, {violations} violations ({counts})")
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
