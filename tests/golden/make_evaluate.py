"""Golden values for tests/evaluate: ridge regression by numpy.

Run from the repository root: .venv/bin/python tests/golden/make_evaluate.py   (numpy 2)
Writes tests/golden/evaluate/ridge.json. Each fit solves the augmented least squares problem [x; sqrt(lambda) I] w = [y; 0] of centred rows by SVD,
so that nothing but the definition is shared with the normal equations.
"""
import json
import pathlib

import numpy as np

OUT = pathlib.Path(__file__).parent / "evaluate"
OUT.mkdir(exist_ok=True)
rng = np.random.default_rng(5)

N, F, P, HELD_OUT = 40, 6, 3, 8
RATIOS = [1e-4, 1e-2, 0.1, 1.0, 10.0]
x = rng.normal(size=(N, F)) * [1, 2, 0.5, 1, 1, 3] + [0, 1, 0, -2, 0, 5]
x[rng.random(x.shape) < 0.5] = 0  # sparse
x[:, 4] = x[:, 3]  # rank deficient without a penalty
y = x @ rng.normal(size=(F, P)) + [3, 0, -1] + 2 * rng.normal(size=(N, P))


def fit(x, y, ratio):
    mx, my = x.mean(0), y.mean(0)
    penalty = ratio * ((x - mx) ** 2).sum(0).mean()
    a = np.vstack([x - mx, np.sqrt(penalty) * np.eye(F)])
    w = np.linalg.lstsq(a, np.vstack([y - my, np.zeros((F, P))]), rcond=None)[0]
    return w, mx, my, penalty


def predict(model, x):
    w, mx, my, _ = model
    return (x - mx) @ w + my


errors = [float(((predict(fit(x[:-HELD_OUT], y[:-HELD_OUT], r), x[-HELD_OUT:]) - y[-HELD_OUT:]) ** 2).mean()) for r in RATIOS]
best = int(np.argmin(errors))
model = fit(x, y, RATIOS[best])
golden = {"ratios": RATIOS, "held_out": HELD_OUT, "x": x.tolist(), "y": y.tolist(), "errors": errors, "best": best, "lambda": model[3], "weight": model[0].tolist(), "prediction": predict(model, x).tolist()}
(OUT / "ridge.json").write_text(json.dumps(golden) + "\n")
print("errors", errors, "best", RATIOS[best])
