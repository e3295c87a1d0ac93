"""Golden values for tests/ot from POT. Run: python tests/golden/make_ot.py  (POT 0.9.7.post1, numpy 2, OMP_NUM_THREADS=1)

Writes tests/golden/ot/pot.txt: blocks of "name rows columns" followed by the numbers, row by row.
Clouds are ot.datasets.make_2D_samples_gauss; costs squared Euclidean divided by their maximum, as in POT's own test-suite.
The ten-iteration plans keep POT's defaults (at most 1000 inner iterations, inner stop 1e-9): their marginals are off by up to 1e-6.
"""
import pathlib
import warnings

import numpy as np
import ot
from scipy.spatial.distance import cdist

warnings.simplefilter("ignore")
OUT = pathlib.Path(__file__).parent / "ot" / "pot.txt"
blocks = []


def put(name, value):
    value = np.atleast_2d(np.asarray(value, dtype=np.float64))
    rows = "\n".join(" ".join(repr(float(v)) for v in row) for row in value)
    blocks.append(f"{name} {value.shape[0]} {value.shape[1]}\n{rows}\n")


def gauss(n, seed):
    return ot.datasets.make_2D_samples_gauss(n, np.zeros(2), np.eye(2), random_state=seed)


def cost(x):
    c = cdist(x, x, "sqeuclidean")
    return c / c.max()


def solve(cx, cy, p, q, **kw):
    plan, log = ot.gromov.entropic_gromov_wasserstein(cx, cy, p, q, log=True, **kw)
    return plan, log["gw_dist"]


x = gauss(10, 42)
put("x10", x)
for solver, epsilon in (("PGD", 0.01), ("PPA", 0.1)):
    plan, value = solve(cost(x), cost(x[::-1]), None, None, solver=solver, epsilon=epsilon, max_iter=10)
    put(f"{solver}10.value", value)
    put(f"{solver}10.plan", plan)

a, b = gauss(20, 4), gauss(20, 5)
put("a20", a)
put("b20", b)
# Odd shape, non-uniform marginals, KL loss, an asymmetric cost.
c = gauss(7, 3)
put("c7", c)
p = np.arange(1.0, 21.0)
p /= p.sum()
q = np.array([3.0, 1, 1, 2, 1, 4, 2])
q /= q.sum()
for loss in ("square_loss", "kl_loss"):
    plan, value = solve(cost(a), cost(c), p, q, loss_fun=loss, solver="PGD", epsilon=0.05, max_iter=15, numItermax=100000, stopThr=1e-14)
    put(f"weighted.{loss}.value", value)
    put(f"weighted.{loss}.plan", plan)
skew = np.random.RandomState(0).rand(7, 7)
put("skew7", skew)
plan, value = solve(cost(a), skew, p, q, solver="PGD", epsilon=0.05, max_iter=15, numItermax=100000, stopThr=1e-14)
put("asymmetric.value", value)
put("asymmetric.plan", plan)

OUT.parent.mkdir(exist_ok=True)
OUT.write_text("".join(blocks))
