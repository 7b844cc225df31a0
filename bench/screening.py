"""Screening of recipe pieces, one training each: `python -m bench.screening DATA '{"muon_lr": 0.04, ...}'` prints a row.

Written to be thrown away: many pieces in one loop, none resumable. Those that helped are in engine/optim; the
numbers are in docs/learning.md. DATA: token shards of bytes. Options and their defaults are in DEFAULTS.
"""

import json
import math
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

torch.set_num_threads(int(os.environ.get("NT", "1")))
from dataclasses import replace

from engine.device import tune_malloc
from model.gpt2 import GPT2, GPT2Config
from model.presets import PRESETS

DEFAULTS = dict(
    arm="x",
    model="tiny",
    init="zero_residual",
    steps=760,
    B=16,
    T=64,
    seed=101,
    opt="muon",
    lr=4e-3,
    muon_lr=0.02,
    mom=0.95,
    nesterov=True,
    split=False,
    rownorm=False,
    ns="jordan",
    ns_steps=5,
    sched="cosine",
    warm=76,
    minr=0.02,
    decay=0.4,
    beta1=0.9,
    beta2=0.99,
    wd=0.1,
    cautious=False,
    wd_tied=True,
    slow=0.0,
    slow_beta=0.99,
    ema=0.0,
    bramp=None,
    tramp=None,
    clip=1.0,
    adam_warm=None,
    scale="max1",
    wte_lr=1.0,
    muon_min=None,
    momwarm=0,
    shift=0,
    soap_freq=10,
    soap_beta=0.95,
    eval_every=0,
    wpe_lr=1.0,
    dim1_lr=1.0,
    adam_wd=None,
    power=1.0,
    wte_std=None,
    wpe_std=None,
    mat_std=None,
    outer=0.0,
    outer_mom=0.5,
    outer_every=15,
    look=0.0,
    look_beta=0.95,
    look_end=0.7,
    awarm=None,
    asched=None,
    momcool=0,
    qk=1.0,
    wd_wte=None,
    lion=False,
    floor=0.0,
    clipm=True,
)


def load(path, split):
    import glob

    f = sorted(glob.glob(f"{path}/*{split}*.bin"))[0]
    raw = np.fromfile(f, dtype=np.uint16)
    return raw[512:]  # header 1024 bytes


PE = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


def orth(m, kind, steps):
    wide = m.shape[1] <= m.shape[2]
    x = m if wide else m.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) * (1.02 if kind == "polar" else 1) + 1e-7)
    for i in range(steps):
        a, b, c = PE[min(i, 4)] if kind == "polar" else (3.4445, -4.7750, 2.0315)
        g = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(g, g, g, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def factor(o, s):
    n, w = o["steps"], o["warm"]
    if w and s < w:
        return (s + 1) / w
    if o["sched"] == "cosine":
        p = min(1, (s - w) / max(1, n - w))
        return o["minr"] + (1 - o["minr"]) * 0.5 * (1 + math.cos(math.pi * p))
    d = max(1, round(o["decay"] * n))
    if s < n - d:
        return 1.0
    p = (n - s) / d
    if o["sched"] == "wsd":
        return o["minr"] + (1 - o["minr"]) * p
    if o["sched"] == "wsqrt":
        return o["minr"] + (1 - o["minr"]) * (1 - math.sqrt(1 - p))


def main(o):
    tune_malloc()
    o = DEFAULTS | o
    torch.manual_seed(o["seed"])
    cfg = PRESETS[o["model"]] if isinstance(o["model"], str) else GPT2Config(**o["model"])
    cfg = replace(cfg, init=o["init"])
    model = GPT2(cfg)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for n_, p in named.items():
            if n_.startswith("wte") and o["wte_std"]:
                p.mul_(o["wte_std"] * cfg.n_embd**0.5)
            if n_.startswith("wpe") and o["wpe_std"] is not None:
                p.mul_(o["wpe_std"] * cfg.n_embd**0.5)
            if n_.startswith("h.") and p.ndim == 2 and o["mat_std"]:
                p.mul_(o["mat_std"])
    anchor = {n: p.detach().clone() for n, p in named.items()} if o["outer"] else None
    outer_m = {n: torch.zeros_like(p) for n, p in named.items()} if o["outer"] else None
    lookm = {n: torch.zeros_like(p) for n, p in named.items()} if o["look"] else None
    groups = []  # optimiser entries
    mats = (
        {n: p for n, p in named.items() if n.startswith("h.") and p.ndim == 2} if o["opt"] in ("muon", "soap") else {}
    )
    adam = {n: p for n, p in named.items() if n not in mats}
    tr, va = load(o["data"], "train"), load(o["data"], "val")
    ntr = int(len(tr) * 0.9)
    tune = tr[ntr:]
    state = {n: {} for n in named}
    g = np.random.default_rng(o["seed"] * 7919 + 13)
    T0 = o["T"]

    def evaluate(stream, k=65536):
        T = T0
        n = (len(stream) - 1) // T
        idx = np.arange(k // T) * n // (k // T)
        tot = 0.0
        model.eval()
        with torch.no_grad():
            for i in range(0, len(idx), 128):
                b = torch.from_numpy(
                    np.stack([stream[j * T : j * T + T + 1] for j in idx[i : i + 128]]).astype(np.int64)
                )
                tot += float(model(b[:, :-1], b[:, 1:])) * len(b)
        model.train()
        return tot / len(idx)

    ema = {n: p.detach().clone() for n, p in named.items()} if o["ema"] else None
    began = time.process_time()
    w0 = time.perf_counter()
    opt_t = 0.0
    tokens = 0
    curve = []
    for s in range(o["steps"]):
        B, T = o["B"], T0
        if o["bramp"]:  # [[frac, B], ...] stages by share of steps
            for frac, b in o["bramp"]:
                if s >= frac * o["steps"]:
                    B = b
        if o["tramp"]:
            for frac, t in o["tramp"]:
                if s >= frac * o["steps"]:
                    T = t
                    B = o["B"] * T0 // t
        n = (ntr - 1) // T
        idx = g.integers(0, n, B)
        b = torch.from_numpy(np.stack([tr[j * T : j * T + T + 1] for j in idx]).astype(np.int64))
        tokens += B * T
        ahead = None
        if lookm is not None and 20 < s < o["look_end"] * o["steps"]:
            ahead = {n_: m.mul(o["look"] / (1 - o["look_beta"]) * factor(o, s)) for n_, m in lookm.items()}
            with torch.no_grad():
                for n_, p in named.items():
                    p.add_(ahead[n_])
        prev = {n_: p.detach().clone() for n_, p in named.items()} if lookm is not None else None
        loss = model(b[:, :-1], b[:, 1:])
        loss.backward()
        q0 = time.perf_counter()
        gn = torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip"])
        f = factor(o, s)
        with torch.no_grad():
            fa = factor(
                o | {"warm": o["awarm"] if o["awarm"] is not None else o["warm"], "sched": o["asched"] or o["sched"]}, s
            )
            alr, mlr = o["lr"] * fa, o["muon_lr"] * f
            # adam
            for n_, p in adam.items():
                st = state[n_]
                if not st:
                    st["m"] = torch.zeros_like(p)
                    st["v"] = torch.zeros_like(p)
                st["m"].lerp_(p.grad, 1 - o["beta1"])
                st["v"].lerp_(p.grad**2, 1 - o["beta2"])
                u = (st["m"] / (1 - o["beta1"] ** (s + 1))) / ((st["v"] / (1 - o["beta2"] ** (s + 1))).sqrt() + 1e-8)
                lr = (
                    alr
                    * (o["wte_lr"] if n_.startswith("wte") else o["wpe_lr"] if n_.startswith("wpe") else 1)
                    * (o["dim1_lr"] if p.ndim == 1 else 1)
                )
                if p.ndim >= 2:
                    decay(o, p, u, lr, o["wd"] if o["adam_wd"] is None else o["adam_wd"], f)
                p.add_(u, alpha=-lr)
            # matrices
            mom = o["mom"] if s >= o["momwarm"] else 0.85 + (o["mom"] - 0.85) * s / o["momwarm"]
            by = {}
            for n_, p in mats.items():
                st = state[n_]
                if "m" not in st:
                    st["m"] = torch.zeros_like(p)
                st["m"].lerp_(p.grad, 1 - mom)
                u = p.grad.lerp(st["m"], mom) if o["nesterov"] else st["m"].clone()
                if o["slow"]:
                    if "s" not in st:
                        st["s"] = torch.zeros_like(p)
                    st["s"].lerp_(p.grad, 1 - o["slow_beta"])
                    u = u + o["slow"] * st["s"]
                parts = u.chunk(3) if o["split"] and p.shape[0] == 3 * p.shape[1] else [u]
                if o["opt"] == "soap":
                    for k, part in enumerate(parts):
                        soap(o, st, k, part, p, p.grad.chunk(len(parts))[k], s, mlr, f, len(parts))
                    continue
                for k, part in enumerate(parts):
                    by.setdefault(part.shape, []).append((n_, p, k, len(parts), part))
            for shape, items in by.items():
                us = orth(torch.stack([i[4] for i in items]), o["ns"], o["ns_steps"])
                for (n_, p, k, np_, _), u in zip(items, us):
                    st = state[n_]
                    if o["rownorm"]:
                        v = st.setdefault(f"v{k}", torch.zeros(shape[0], 1))
                        v.lerp_((u * u).mean(1, keepdim=True), 0.05)
                        before = u.norm()
                        u = u / ((v / (1 - 0.95 ** (s + 1))).sqrt() + 1e-8)
                        u = u * (before / (u.norm() + 1e-12))
                    sc = (
                        max(1.0, shape[0] / shape[1]) ** 0.5
                        if o["scale"] == "max1"
                        else (shape[0] / shape[1]) ** 0.5
                        if o["scale"] == "spec"
                        else 0.2 * max(shape) ** 0.5
                    )
                    pk = p.chunk(np_)[k]
                    if o["floor"]:
                        un, wn = u.norm() * sc, pk.norm()
                        sc = sc * max(1.0, float(o["floor"] * wn / un)) if float(un) else sc
                    decay(o, pk, u, mlr, o["wd"], f)
                    pk.add_(u, alpha=-mlr * sc)
            if lookm is not None:
                for n_, p in named.items():
                    lookm[n_].lerp_(p - prev[n_] + (ahead[n_] if ahead else 0) * 0, 1 - o["look_beta"])

            if anchor is not None and ((s + 1) % o["outer_every"] == 0 or s + 1 == o["steps"]):
                for n_, p in named.items():
                    d = p - anchor[n_]
                    outer_m[n_].mul_(o["outer_mom"]).add_(d)
                    anchor[n_].add_(d + o["outer_mom"] * outer_m[n_], alpha=o["outer"])
                    p.copy_(anchor[n_])
            if ema is not None and s >= 0:
                e = min(o["ema"], (s + 1) / (s + 10))
                for n_, p in named.items():
                    ema[n_].lerp_(p, 1 - e)
        for p in named.values():
            p.grad = None
        opt_t += time.perf_counter() - q0
        if o["eval_every"] and (s + 1) % o["eval_every"] == 0 and s + 1 < o["steps"]:
            curve.append((s + 1, evaluate(tune)))
    row = {k: o[k] for k in o if o[k] != DEFAULTS[k] or k in ("arm", "seed", "steps", "lr", "muon_lr")}
    row |= dict(
        tokens=tokens,
        cpu=round(time.process_time() - began, 1),
        opt_s=round(opt_t, 1),
        wall=round(time.perf_counter() - w0, 1),
    )
    row |= dict(tune=round(evaluate(tune), 4), val=round(evaluate(va), 4))
    if ema is not None:
        for n_, p in named.items():
            p.data.copy_(ema[n_])
        row |= dict(tune_ema=round(evaluate(tune), 4), val_ema=round(evaluate(va), 4))
    if curve:
        row["curve"] = curve
    return row


def decay(o, p, u, lr, wd, f):
    r = lr * wd if o["wd_tied"] else o_wd(o, wd, f)
    if o["cautious"]:
        p.sub_(r * p * (u * p > 0))
    else:
        p.mul_(1 - r)


def o_wd(o, wd, f):  # decay tied to the square of the rate's factor
    return wd * o["muon_lr"] * f * f


def soap(o, st, k, u, p, grad, s, mlr, f, np_):
    """u: momentum part; SOAP: Adam in eigenbasis, on grad"""
    d = st.setdefault(k, {})
    b = o["soap_beta"]
    if not d:
        d["L"] = torch.zeros(grad.shape[0], grad.shape[0])
        d["R"] = torch.zeros(grad.shape[1], grad.shape[1])
        d["v"] = torch.zeros_like(grad)
    d["L"].lerp_(grad @ grad.T, 1 - b)
    d["R"].lerp_(grad.T @ grad, 1 - b)
    if "QL" not in d:
        d["QL"] = torch.linalg.eigh(d["L"])[1]
        d["QR"] = torch.linalg.eigh(d["R"])[1]
    elif s % o["soap_freq"] == 0:
        d["QL"] = torch.linalg.qr(d["L"] @ d["QL"])[0]
        d["QR"] = torch.linalg.qr(d["R"] @ d["QR"])[0]
    gp = d["QL"].T @ grad @ d["QR"]
    d["v"].lerp_(gp * gp, 1 - b)
    mp = d["QL"].T @ u @ d["QR"]
    w = d["QL"] @ (mp / ((d["v"] / (1 - b ** (s + 1))).sqrt() + 1e-8)) @ d["QR"].T
    if "soapmuon" in o["arm"]:
        w = orth(w[None], o["ns"], o["ns_steps"])[0]
    sc = max(1.0, w.shape[0] / w.shape[1]) ** 0.5 if "soapmuon" in o["arm"] else o.get("soap_scale", 0.1)
    pk = p.chunk(np_)[k]
    decay(o, pk, w, mlr, o["wd"], f)
    pk.add_(w, alpha=-mlr * sc)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[2]) | {"data": sys.argv[1]})))
